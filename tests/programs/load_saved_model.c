/* Loads SavedModels through TensorFlow's C API and runs them, as a server without Python does.

   load_saved_model MANIFEST [--no-xla]

   The manifest has, for each SavedModel, its folder, the number of inputs and a line for each: operation, index, dtype as
   a number, rank, sizes, file; then the number of outputs and a line for each: operation, index, file. A file holds
   the bytes of a tensor; of strings, each as a 32-bit length and its bytes. Names and paths hold no spaces. With
   --no-xla XLA compilation is disabled, as TensorFlow Serving does unless it is told otherwise. */

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"

enum { LONGEST = 4096, MOST = 16 };

static void require(int good, const char* what) {
  if (!good) {
    fprintf(stderr, "%s\n", what);
    exit(2);
  }
}

static void check(TF_Status* status, const char* folder) {
  if (TF_GetCode(status) != TF_OK) {
    fprintf(stderr, "%s: %s\n", folder, TF_Message(status));
    exit(1);
  }
}

static TF_Tensor* read_tensor(int dtype, const int64_t* sizes, int rank, const char* path) {
  FILE* file = fopen(path, "rb");
  require(file != NULL, path);
  int64_t count = 1;
  for (int axis = 0; axis < rank; ++axis) count *= sizes[axis];
  TF_Tensor* tensor;
  if (dtype == TF_STRING) {
    tensor = TF_AllocateTensor(TF_STRING, sizes, rank, count * sizeof(TF_TString));
    TF_TString* strings = TF_TensorData(tensor);
    for (int64_t i = 0; i < count; ++i) {
      uint32_t length;
      char text[LONGEST];
      require(fread(&length, sizeof length, 1, file) == 1 && length < LONGEST, "a string is cut off");
      require(fread(text, 1, length, file) == length, "a string is cut off");
      TF_StringInit(&strings[i]);
      TF_StringCopy(&strings[i], text, length);
    }
  } else {
    size_t length = count * TF_DataTypeSize(dtype);
    tensor = TF_AllocateTensor(dtype, sizes, rank, length);
    require(fread(TF_TensorData(tensor), 1, length, file) == length, "a file is too short");
  }
  fclose(file);
  return tensor;
}

static void run(FILE* manifest, const char* folder) {
  TF_Status* status = TF_NewStatus();
  TF_Graph* graph = TF_NewGraph();
  TF_SessionOptions* options = TF_NewSessionOptions();
  const char* tags[] = {"serve"};
  TF_Session* session = TF_LoadSessionFromSavedModel(options, NULL, folder, tags, 1, graph, NULL, status);
  check(status, folder);

  TF_Output inputs[MOST], outputs[MOST];
  TF_Tensor *given[MOST], *found[MOST];
  char name[LONGEST], path[LONGEST], files[MOST][LONGEST];
  int number, index, dtype, rank, wanted;
  require(fscanf(manifest, "%d", &number) == 1 && number <= MOST, "number of inputs");
  for (int i = 0; i < number; ++i) {
    int64_t sizes[MOST];
    require(fscanf(manifest, "%4095s %d %d %d", name, &index, &dtype, &rank) == 4 && rank <= MOST, "an input");
    for (int axis = 0; axis < rank; ++axis) {
      long long size;
      require(fscanf(manifest, "%lld", &size) == 1, "a size");
      sizes[axis] = size;
    }
    require(fscanf(manifest, "%4095s", path) == 1, "a path");
    inputs[i] = (TF_Output){TF_GraphOperationByName(graph, name), index};
    require(inputs[i].oper != NULL, name);
    given[i] = read_tensor(dtype, sizes, rank, path);
  }
  require(fscanf(manifest, "%d", &wanted) == 1 && wanted <= MOST, "number of outputs");
  for (int i = 0; i < wanted; ++i) {
    require(fscanf(manifest, "%4095s %d %4095s", name, &index, files[i]) == 3, "an output");
    outputs[i] = (TF_Output){TF_GraphOperationByName(graph, name), index};
    require(outputs[i].oper != NULL, name);
  }
  TF_SessionRun(session, NULL, inputs, given, number, outputs, found, wanted, NULL, 0, NULL, status);
  check(status, folder);
  for (int i = 0; i < wanted; ++i) {
    FILE* file = fopen(files[i], "wb");
    require(file != NULL, files[i]);
    /* the dtype first, for it must be the one that the signature promises */
    int32_t found_dtype = TF_TensorType(found[i]);
    fwrite(&found_dtype, sizeof found_dtype, 1, file);
    fwrite(TF_TensorData(found[i]), 1, TF_TensorByteSize(found[i]), file);
    fclose(file);
    TF_DeleteTensor(found[i]);
  }
  for (int i = 0; i < number; ++i) TF_DeleteTensor(given[i]);
  TF_CloseSession(session, status);
  TF_DeleteSession(session, status);
  TF_DeleteSessionOptions(options);
  TF_DeleteGraph(graph);
  TF_DeleteStatus(status);
}

int main(int count, char** arguments) {
  require(count > 1, "load_saved_model MANIFEST [--no-xla]");
  if (count > 2 && strcmp(arguments[2], "--no-xla") == 0) {
    /* tensorflow::DisableXlaCompilation(), which has no name in C */
    void (*disable)(void) = (void (*)(void))dlsym(RTLD_DEFAULT, "_ZN10tensorflow21DisableXlaCompilationEv");
    require(disable != NULL, "no DisableXlaCompilation");
    disable();
  }
  FILE* manifest = fopen(arguments[1], "r");
  require(manifest != NULL, arguments[1]);
  char folder[LONGEST];
  while (fscanf(manifest, "%4095s", folder) == 1) run(manifest, folder);
  fclose(manifest);
  return 0;
}
