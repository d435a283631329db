"""All that a Keras object holds, compared with what its copy holds, in one walk over both."""

import functools
import types
import weakref

import keras
import numpy as np
import tensorflow as tf

# What belongs to one object, or to the graph of a model, which is made again: nobody's state.
_OF_ONE_OBJECT = {
    *("_auto_config", "_call_signature", "_call_has_mask_arg", "_call_has_training_arg", "_dtype", "_dtype_policy"),
    *("_inbound_nodes", "_outbound_nodes", "_losses", "_loss_ids", "_losses_override", "_tracked", "build", "quantize"),
    *("_distribute_strategy", "_distribution_strategy", "_inputs", "_inputs_struct", "_outputs", "_outputs_struct"),
    *("_nodes", "_nodes_by_depth", "_operations", "_operations_by_depth", "_functional", "_compile_config"),
    *("_compile_loss", "_compile_metrics", "_loss_tracker", "train_function", "test_function", "predict_function"),
    *("_saved_model_arg_spec", "_saved_model_inputs_spec", "_compiled_trainable_state", "_layers", "_update"),
    *("_trainable_variables_indices", "_exclude_from_weight_decay", "_exclude_from_weight_decay_cache"),
    *("call_signature_parameters", "_tracker", "_self_setattr_tracking", "_self_saveable_object_factories"),
    *("_self_unconditional_checkpoint_dependencies", "_self_unconditional_dependency_names"),
    *("_self_unconditional_deferred_dependencies", "_self_update_uid", "_self_name_based_restores"),
    *("_converted_to", "_marks"),  # what files say; the number that one wrapper tells its gradients by
}
# What another class in its place or another policy may change.
_OF_THE_POLICY = {
    *("autocast", "_input_spec", "supports_jit", "_supports_masking", "activation", "activity_regularizer"),
    *("limit", "recurrent_activation", "_convert_input_args", "_inverse_sqrt_key_dim", "_flash_attention"),
}


_STATE = (keras.Layer, keras.Variable, keras.Optimizer, keras.Metric, keras.random.SeedGenerator, tf.Variable)


def differences(model, copy, converted=False):
    """What the copy has not as the model has it, in words; an empty list where nothing is lost.

    Args:
        model: a Keras model.
        copy: its copy.
        converted: whether the copy has another policy, and with it other classes and functions.
    """
    walk = _Walk(converted)
    walk.compare(model, copy, model.name)
    return walk.found


class _Walk:
    def __init__(self, converted):
        self.found, self.pairs, self.back, self.alive = [], {}, {}, []
        self.converted = converted

    def same(self, what, there, here, where):
        if there != here:
            self.found.append(f"{where}: {what} {there!r} became {here!r}")

    def compare(self, there, here, where):
        if isinstance(there, (bool, int, float, complex, str, bytes, type(None), type, types.ModuleType, np.dtype)):
            self.same("", there, here, where)
            return
        if self.converted and isinstance(here, keras.optimizers.LossScaleOptimizer):
            here = here.inner_optimizer if type(there) is not type(here) else here
        self.alive += [there, here]
        if id(there) in self.pairs:
            if self.pairs[id(there)] is not here and isinstance(there, _STATE):
                self.found.append(f"{where}: what was one object is two")
            return
        if isinstance(there, _STATE):
            if there is here:
                self.found.append(f"{where}: model and copy share it")
            if id(here) in self.back:
                self.found.append(f"{where}: what were two objects is one")
            self.pairs[id(there)], self.back[id(here)] = here, there
        else:
            self.pairs[id(there)] = here
        for kinds, compare in (
            (keras.Layer, self.layers),
            (keras.Variable, self.variables),
            (keras.KerasTensor, lambda a, b, w: self.same("shape", (a.shape, a.dtype), (b.shape, b.dtype), w)),
            (tf.Variable, lambda a, b, w: self.arrays(a, b, w)),
            (tf.random.Generator, lambda a, b, w: self.arrays(a.state, b.state, w)),
            ((keras.Optimizer, keras.Metric), self.trackers),
            ((tf.Tensor, np.ndarray), self.arrays),
            (tf.lookup.experimental.MutableHashTable, self.tables),
            (tf.lookup.experimental.DenseHashTable, self.tables),
            (tf.lookup.StaticHashTable, lambda a, b, w: self.tables(a, b, w, shared=True)),
            (dict, self.dicts),
            ((list, tuple), self.lists),
            (set, lambda a, b, w: self.same("size", len(a), len(b), w)),
            (types.FunctionType, self.functions),
            (types.MethodType, lambda a, b, w: self.compare(a.__self__, b.__self__, f"{w}.__self__")),
            (
                functools.partial,
                lambda a, b, w: self.lists([a.func, a.args, a.keywords], [b.func, b.args, b.keywords], w),
            ),
            (weakref.ref, lambda a, b, w: self.compare(a(), b(), f"{w}()")),
        ):
            if isinstance(there, kinds):
                if not isinstance(here, kinds):
                    self.found.append(f"{where}: {there!r} became {here!r}")
                else:
                    compare(there, here, where)
                return
        if there is not here and type(there).__module__.split(".")[0] not in ("tensorflow", "builtins"):
            self.same("class", type(there).__name__, type(here).__name__, where)
            self.attributes(there, here, where)

    def layers(self, there, here, where):
        ours, theirs = type(here), type(there)
        related = issubclass(ours, theirs) or issubclass(theirs, ours)
        related = related or {ours.__name__, theirs.__name__} <= {"Dense", "Head"}
        if not (ours is theirs or (self.converted and related)):
            self.same("class", theirs.__name__, ours.__name__, where)
        for name in ("weights", "trainable_variables", "non_trainable_variables", "variables"):
            self.same(name, *([each.path for each in getattr(layer, name)] for layer in (there, here)), where)
        inner = [[each.name for each in _inner(layer)] for layer in (there, here)]
        self.same("layers", *inner, where)
        for each, other in zip(_inner(there), _inner(here), strict=False):
            self.compare(each, other, f"{where}/{each.name}")
        if not isinstance(there, (keras.Sequential, keras.Model)):
            self.trackers(there, here, where)
        else:
            self.attributes(there, here, where)
        if isinstance(there, keras.Model) and there.compiled:
            self.same("compiled", True, here.compiled, where)

    def trackers(self, there, here, where):
        for store in there._tracker.config:
            items = [owner._tracker.config[store][1] for owner in (there, here)]
            self.same(f"number of tracked {store}", *map(len, items), where)
            for number, (each, other) in enumerate(zip(*items, strict=False)):
                self.compare(each, other, f"{where}<{store}{number}>")
            self.same(f"ids of {store}", {id(each) for each in items[1]}, here._tracker.stored_ids[store], where)
        if isinstance(there, keras.Optimizer):
            keys = [
                {optimizer._var_key(variable): number for number, variable in enumerate(optimizer._trainable_variables)}
                for optimizer in (there, here)
            ]
            if there._trainable_variables_indices == keys[0]:
                self.same("numbers", keys[1], dict(here._trainable_variables_indices), where)
            excluded = [
                [owner._use_weight_decay(variable) for variable in owner._trainable_variables]
                for owner in (there, here)
            ]
            self.same("weight decay", *excluded, where)
        self.attributes(there, here, where)

    def attributes(self, there, here, where):
        ours = getattr(here, "__dict__", {})
        for name, value in dict(getattr(there, "__dict__", {})).items():
            if name in _OF_ONE_OBJECT or (self.converted and name in _OF_THE_POLICY):
                continue
            if isinstance(value, keras.DTypePolicy) or (name == "_is_quantized"):
                continue
            if name not in ours:
                self.found.append(f"{where}.{name} is lost")
            else:
                self.compare(value, ours[name], f"{where}.{name}")

    def variables(self, there, here, where):
        for name in ("path", "name", "trainable", "shape", "overwrite_with_gradient", "aggregation"):
            self.same(name, getattr(there, name), getattr(here, name), where)
        self.same("dtype", there.dtype, here.dtype, where)
        self.arrays(there.value, here.value, where)
        for name in ("regularizer", "constraint"):
            self.same(name, type(getattr(there, name)), type(getattr(here, name)), where)

    def arrays(self, there, here, where):
        there, here = np.asarray(there), np.asarray(here)
        if there.dtype.kind in "fV":  # of bfloat16 as well
            there, here = there.astype("float64"), here.astype("float64")
        if there.shape != here.shape or not np.array_equal(there, here, equal_nan=there.dtype.kind == "f"):
            self.found.append(f"{where}: values {there.tolist()} became {here.tolist()}"[:300])

    def tables(self, there, here, where, shared=False):
        if there is here and not shared:
            self.found.append(f"{where}: model and copy share a table")
        contents = [
            sorted(zip(*(each.numpy().tolist() for each in table.export()), strict=True)) for table in (there, here)
        ]
        self.same("table", *contents, where)

    def dicts(self, there, here, where):
        self.same("keys", [*map(str, there)], [*map(str, here)], where)
        for (key, each), other in zip(there.items(), here.values(), strict=False):
            self.compare(each, other, f"{where}[{key!r}]")

    def lists(self, there, here, where):
        self.same("length", len(there), len(here), where)
        for number, (each, other) in enumerate(zip(there, here, strict=False)):
            self.compare(each, other, f"{where}[{number}]")

    def functions(self, there, here, where):
        if self.converted and there.__name__ == here.__name__:
            return
        self.same("code", there.__code__, here.__code__, where)
        for each, other in zip(there.__closure__ or (), here.__closure__ or (), strict=False):
            try:
                self.compare(each.cell_contents, other.cell_contents, f"{where}<closure>")
            except ValueError:
                continue


def _inner(layer):
    return [
        each
        for each in layer._layers
        if not isinstance(each, keras.layers.InputLayer) and type(each).__name__ != "OutputCast"
    ]
