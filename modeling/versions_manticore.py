"""What the releases of Transformers that a hybrid runs on (5.23 and newer) call the same thing.

A published hybrid carries its code, and is loaded by whatever release its user has. Transformers 5.24 renamed the cache
in every model, output and helper: `past_key_values`, and `cache_params` of the models without attention, became
`cache`. Its own models and `generate` still take the old names (until 5.40 and 6.0), its outputs give them with a
warning, and what `generate` hands on to a model has the new one only.
"""

import functools
import inspect

from transformers import GenerationMixin

from .bounds_manticore import ManticoreError

CACHE_NAMES = ("cache", "past_key_values")
"""What a hybrid's forward takes, whatever the release."""

CACHE = next(
    name for name in CACHE_NAMES if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)
"""What this Transformers calls it: the name of the argument that `generate` hands on, and of the outputs' field."""


def cache_argument(forward):
    """The name under which a forward, of whatever model, takes its cache; None: it takes none."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in (*CACHE_NAMES, "cache_params") if name in parameters), None)


def takes_cache(forward):
    """Lets a forward with the parameter `cache` take the cache under both names.

    Its signature shows the name of the Transformers that is installed, which is what that asks for.

    Raises:
        ManticoreError: (of the decorated function) Two caches were given.
    """

    @functools.wraps(forward)
    def renamed(self, *args, **kwargs):
        if "past_key_values" in kwargs:
            given = kwargs.pop("past_key_values")
            if kwargs.get("cache") is None:
                kwargs["cache"] = given
            elif given is not None and given is not kwargs["cache"]:
                raise ManticoreError("Give one cache, as `cache` or as `past_key_values`; here both are given.")
        return forward(self, *args, **kwargs)

    signature = inspect.signature(forward)
    shown = [p.replace(name=CACHE) if p.name == "cache" else p for p in signature.parameters.values()]
    renamed.__signature__ = signature.replace(parameters=shown)
    return renamed
