"""Manifests from files, as kubectl writes and takes them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipelinejob_operator.api.v1alpha1 import KIND
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.policy import acceptance

Manifest = dict[str, Any]


class InputError(ValueError):
    """An input cannot be used; the message names it, and what is allowed."""


def manifests(file: Path) -> Iterator[Manifest]:
    """The objects of a YAML or JSON file, those within lists as well."""
    try:
        documents = list(yaml.load_all(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"{file}: {' '.join(str(error).split())}; allowed: YAML or JSON as kubectl writes it"
        ) from error
    for document in documents:
        if not isinstance(document, dict):
            raise InputError(f"{file}: has a document that is no object; allowed: YAML or JSON as kubectl writes it")
        # kubectl leaves out the kind of objects in a list of one kind only.
        kind = str(document.get("kind", ""))
        if kind.endswith("List"):
            yield from ({"kind": kind.removesuffix("List"), **item} for item in document.get("items", []))
        else:
            yield document


def job_of(file: Path, namespace: str) -> Job:
    """The one PipelineJob of a file, as the API server would store it in ``namespace`` unless it says another."""
    found = [item for item in manifests(file) if item.get("kind") == KIND]
    if len(found) != 1:
        raise InputError(f"{file}: has {len(found)} objects of kind {KIND}; allowed: one")
    (manifest,) = found
    meta = {"name": "", "namespace": namespace, "uid": "", "resourceVersion": "", **manifest.get("metadata", {})}
    return read_job({**manifest, "metadata": meta}, str(file))


def read_job(manifest: Manifest, where: str) -> Job:
    """Read a job that the operator would accept."""
    if not isinstance(manifest.get("spec"), dict):
        raise InputError(f"{where}: spec: Required value; allowed: the spec of a {KIND}")
    try:
        job = Job.read(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{where}: spec.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    case = acceptance.Case(job.spec, job.template, None, len(job.config().to_json().encode()))
    if verdict := acceptance.check(case):
        raise InputError(f"{where}: {verdict.message}")
    return job
