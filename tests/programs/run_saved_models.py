"""Runs `_run_saved_model.py` for one job after another: `python -I run_saved_models.py SCRIPT PATH`.

Each job is a fork of this process, made before TensorFlow's runtime starts. So the slow import happens once. A job is a
line of JSON on standard input. It holds the script's arguments, the environment, the working folder, and files for the
output and the errors. The reply is a line with the exit code.
"""

import json
import os
import runpy
import sys
import traceback


def run(main, job):
    """Runs a job in this process, which is a fork, and ends it."""
    code = 1
    try:
        for number, name in enumerate(("stdout", "stderr"), 1):
            os.dup2(os.open(job[name], os.O_WRONLY), number)
        os.chdir(job["cwd"])
        os.environ.clear()
        os.environ.update(job["env"])
        sys.argv[1:] = job["arguments"]
        sys.path[:] = job["arguments"][1].split(os.pathsep)
        main()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    script, folders = sys.argv[1:]
    sys.argv[1:] = ["", folders]  # the script reads the second one when it is imported
    main = runpy.run_path(script, run_name="imported")["main"]
    for line in sys.stdin:
        child = os.fork()
        if not child:
            run(main, json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
