"""`PolicyMap`: a dtype policy for most layers of a model, and others for layers whose paths match a pattern."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import keras

from keras_mp._compat import keras_layers, patches
from keras_mp.errors import PolicyError

__all__ = ["PolicyMap", "named_policy", "policies_in"]


@keras.saving.register_keras_serializable(package="keras_mp")
class PolicyMap(keras.dtype_policies.DTypePolicyMap):
    r"""A dtype policy for each layer, by regular expressions for the layers' paths.

    The path of a layer is the names from the model down to the layer, joined by "/":
    "classifier/encoder/block_3/query". A pattern has to match a whole path, or a whole end of it that begins at a name.
    So "query" and "block_\d+/query" match that layer, and "block_3/.*" matches all layers inside that block.

    A layer's policy holds for the layers inside it as well, unless a pattern matches one of those: the nearest match
    from the layer outwards decides. If patterns with different policies match the same path, the path is refused. A
    pattern that is the whole path itself comes first.

    It is a `keras.dtype_policies.DTypePolicyMap`, so it can be passed to `keras_mp.set_policy`, to `keras_mp.convert`
    and as a layer's `dtype`. `convert` knows the whole path of every layer. Keras knows the paths of layers that a
    subclassed or Sequential model holds. Layers of a Functional model are called before there is a model, so Keras
    knows only their own names. It looks a path up when the layer is built, so a layer casts its first symbolic input
    to the default policy.

    Args:
        default_policy: the policy, or its name, of layers that no pattern matches. By default the global policy, as it
            is now.
        policy_map: dictionary from patterns to policies or their names. It is copied.

    Raises:
        PolicyError: for an invalid regular expression or policy. Also when a path is looked up that patterns with
            different policies match.

    Example:

    >>> import keras_mp
    >>> policies = keras_mp.PolicyMap("mixed_float16", {r".*/logits": "float32", "encoder": "mixed_bfloat16"})
    >>> [policies[path].name for path in ("model/dense", "model/logits", "model/encoder/block/query")]
    ['mixed_float16', 'float32', 'mixed_bfloat16']
    """

    def __init__(
        self,
        default_policy: str | keras.DTypePolicy | None = None,
        policy_map: Mapping[str, str | keras.DTypePolicy] | None = None,
    ) -> None:
        patches.install_on_first_use()
        if policy_map is not None and not isinstance(policy_map, Mapping):
            raise PolicyError(
                f"`policy_map` must be a dictionary from patterns to policies, such as {{'.*/logits': 'float32'}}. "
                f"Received: {policy_map!r} of type {type(policy_map).__name__}."
            )
        if isinstance(default_policy, keras.dtype_policies.DTypePolicyMap):
            raise PolicyError(
                "`default_policy` is what layers get that no pattern matches, so it cannot be a map itself. Received: "
                f"{default_policy!r}. Give the name of one policy, such as 'mixed_bfloat16'."
            )
        default = keras.config.dtype_policy() if default_policy is None else _policy(default_policy)
        if isinstance(default, keras.dtype_policies.DTypePolicyMap):
            default = default.default_policy
        super().__init__(default)
        self._policy_map: dict[str, keras.DTypePolicy] = {}
        for pattern, policy in (policy_map or {}).items():
            self[pattern] = policy

    @property
    def name(self) -> str:
        """The name that Keras gives to a map: "map_" and the name of the default policy."""
        return f"map_{self.default_policy.name}"

    def __getitem__(self, key: str) -> keras.DTypePolicy:
        parts = key.split("/")
        for depth in range(len(parts), 0, -1):
            path = "/".join(parts[:depth])
            matches = self._matching(path)
            if matches:
                return self._agreed(path, matches)
        return self.default_policy

    def __setitem__(self, key: str, policy: str | keras.DTypePolicy) -> None:
        if not isinstance(key, str):
            raise PolicyError(
                f"A pattern is a string, matched against the paths of layers. Received: {key!r} of type "
                f"{type(key).__name__}."
            )
        if key in self._policy_map:
            raise PolicyError(f"The map has a policy for {key!r} already: {self._policy_map[key].name!r}.")
        try:
            re.compile(key)
        except re.error as error:
            raise PolicyError(
                f"The pattern {key!r} is no regular expression: {error}. To match any characters type '.*', as in "
                "'encoder/.*'; for a dot or a bracket itself, put a backslash before it."
            ) from error
        policy = _policy(policy)
        if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
            raise PolicyError(f"The policy for {key!r} is a map itself. Give the name of one policy.")
        self._policy_map[key] = policy

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, PolicyMap)
            and self.default_policy == other.default_policy
            and list(self._policy_map.items()) == list(other._policy_map.items())
        )

    __hash__ = None  # type: ignore[assignment]  # a map can be changed, as a dictionary can

    def __repr__(self) -> str:
        policies = {pattern: policy.name for pattern, policy in self._policy_map.items()}
        return f'<PolicyMap "{self.default_policy.name}", {policies}>'

    def unmatched(self, model: "keras.Layer | Iterable[str]") -> dict[str, list[str]]:
        """Returns the patterns that match no layer. They are likely misspelt.

        Args:
            model: a built model or layer, or the paths of its layers.

        Returns:
            Dictionary from each such pattern to the three closest paths, or fewer.

        Example:

        >>> import keras, keras_mp
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="logits")], name="classifier")
        >>> keras_mp.PolicyMap("mixed_float16", {"logit": "float32"}).unmatched(model)
        {'logit': ['classifier/logits']}
        """
        paths = list(keras_layers.layers_by_path(model)) if isinstance(model, keras.Layer) else list(model)
        names = {path.split("/")[-1]: path for path in reversed(paths)}
        return {
            pattern: [names[name] for name in difflib.get_close_matches(pattern.split("/")[-1], names, cutoff=0.5)]
            for pattern in self._policy_map
            if not any(pattern in self._matching(path) for path in paths)
        }

    def names(self, path: str) -> bool:
        """Whether a pattern decides for a path, rather than the default.

        Args:
            path: the path of a layer.
        """
        parts = path.split("/")
        return any(self._matching("/".join(parts[:depth])) for depth in range(1, len(parts) + 1))

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal map."""
        serialize = keras.dtype_policies.serialize
        return {
            "default_policy": serialize(self.default_policy),
            "policy_map": {pattern: serialize(policy) for pattern, policy in self._policy_map.items()},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "PolicyMap":
        """Makes a map from the result of `get_config`.

        Args:
            config: the configuration.
            custom_objects: dictionary from names to classes of policies that are not registered.
        """

        def policy(value: str | dict[str, Any]) -> str | keras.DTypePolicy:
            return keras.dtype_policies.deserialize(value, custom_objects) if isinstance(value, dict) else value

        policies = {pattern: policy(value) for pattern, value in config["policy_map"].items()}
        return cls(policy(config["default_policy"]), policies)

    def _matching(self, path: str) -> list[str]:
        """Returns the patterns for a path itself, not those for the layers around it."""
        if path in self._policy_map:
            return [path]
        parts = path.split("/")
        ends = ["/" + path, *("/".join(parts[start:]) for start in range(len(parts)))]
        return [pattern for pattern in self._policy_map if any(re.fullmatch(pattern, end) for end in ends)]

    def _agreed(self, path: str, patterns: list[str]) -> keras.DTypePolicy:
        policy = self._policy_map[patterns[0]]
        if any(self._policy_map[pattern] != policy for pattern in patterns):
            found = ", ".join(f"{pattern!r}: {self._policy_map[pattern].name!r}" for pattern in patterns)
            raise PolicyError(
                f"Patterns with different policies match the path {path!r}: {found}. Make them exclude each other, or "
                f"add {path!r} itself, which comes before all patterns."
            )
        return policy


def policies_in(policy: keras.DTypePolicy) -> list[keras.DTypePolicy]:
    """Returns every policy that a layer can get from this one: itself, or a map's default and entries."""
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return [policy.default_policy, *policy.values()]
    return [policy]


def named_policy(policy: keras.DTypePolicy, path: str) -> tuple[keras.DTypePolicy, bool]:
    """Returns the policy of the layer at a path, and whether a pattern of a map names it.

    Args:
        policy: a policy, or a map of them.
        path: the names from the model down to the layer, joined by "/".
    """
    if isinstance(policy, PolicyMap):
        return policy[path], policy.names(path)
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return policy[path], policy[path] != policy.default_policy
    return policy, False


def _policy(policy: str | keras.DTypePolicy) -> keras.DTypePolicy:
    if not isinstance(policy, (str, keras.DTypePolicy)):
        raise PolicyError(
            f"Expected the name of a dtype policy or a keras.DTypePolicy, received {policy!r} of type "
            f"{type(policy).__name__}."
        )
    try:
        return keras.dtype_policies.get(policy)
    except (TypeError, ValueError) as error:
        raise PolicyError(
            f"Unknown dtype policy {policy!r}. Expected a name such as 'mixed_bfloat16', 'mixed_float16' or 'float32'."
        ) from error
