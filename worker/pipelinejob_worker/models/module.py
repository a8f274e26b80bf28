"""Models from a function in the user's image."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models.layered import LayeredModel
from pipelinejob_worker.protocol import Module


def model_of_module(source: Module) -> LayeredModel:
    """Call the user's function with its arguments, which are strings.

    Raises ConfigurationError, from what the user's code raised if it did, unless it returns a usable model.
    """
    function = _function(source)
    arguments = {argument.name: argument.value for argument in source.arguments}
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ConfigurationError(
            f"spec.model.module.arguments: {sorted(arguments)} do not fit {source.function}: {error}; allowed: the "
            "names of its parameters"
        ) from error
    try:
        model = function(**arguments)
    except ConfigurationError:
        raise
    except Exception as error:
        raise _failed(source, "raised", error) from error
    return _checked(source, model)


def _function(source: Module) -> Callable[..., Any]:
    module_name, _, name = source.function.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise _failed(source, f"cannot be imported: {module_name} raised", error) from error
    function = getattr(module, name, None)
    if not callable(function):
        problem = "has no" if function is None else "holds no function in its"
        raise _refused(source, f"module {module_name} {problem} {name}")
    result: Callable[..., Any] = function
    return result


def _checked(source: Module, model: object) -> LayeredModel:
    if not isinstance(model, LayeredModel):
        raise _refused(source, f"returned a {type(model).__name__}")
    missing = [
        name for name in ("names", "costs", "context", "vocabulary", "width", "fingerprint") if not hasattr(model, name)
    ]
    if missing:
        raise _refused(source, f"returned a model without {missing[0]}")
    if not model.names or len(set(model.names)) != len(model.names) or not all(model.names):
        raise _refused(source, f"returned a model whose layers' names are not distinct: {list(model.names)}")
    if len(model.costs) != len(model.names):
        raise _refused(source, f"returned a model with {len(model.names)} names and {len(model.costs)} costs")
    return model


def _failed(source: Module, verb: str, error: Exception) -> ConfigurationError:
    return _refused(source, f"{verb} {type(error).__name__}: {' '.join(str(error).split())[:500]}")


def _refused(source: Module, problem: str) -> ConfigurationError:
    return ConfigurationError(
        f"spec.model.module.function: {source.function}: {problem}; allowed: package.module:function in the worker "
        "image that returns a pipelinejob_worker.models.LayeredModel"
    )
