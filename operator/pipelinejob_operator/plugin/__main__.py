"""``kubectl pipelinejob draw``: see docs/how-to/draw.md."""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import aiohttp
from kubernetes.aio.config.config_exception import ConfigException

from pipelinejob_operator.build.job import Job
from pipelinejob_operator.placement.topology import TopologyError
from pipelinejob_operator.plugin import picture
from pipelinejob_operator.plugin.files import InputError, Manifest, job_of, manifests, read_job
from pipelinejob_operator.runtime.client import JOBS, NODES, PODS, ApiError, Kubernetes, Resource

DRAWN, INCOMPLETE, UNUSABLE = 0, 1, 2


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="kubectl pipelinejob", description="Look at PipelineJobs.")
    commands = parser.add_subparsers(dest="command", required=True)
    draw = commands.add_parser(
        "draw",
        help="draw the chain of stages over the topology of the nodes",
        description="Draw where the stages of a job are and what their links cost, or, with --dry-run, where a plan "
        "would put the stages of a YAML file. Ends with 0 if every stage has a place, 1 if not, 2 if it cannot tell.",
    )
    draw.add_argument("job", nargs="?", help="name of a PipelineJob in the cluster of KUBECONFIG")
    draw.add_argument("-f", "--filename", type=Path, metavar="FILE", help="with --dry-run: YAML with one PipelineJob")
    draw.add_argument("--dry-run", action="store_true", help="plan anew instead of showing where the stages are")
    draw.add_argument("-n", "--namespace", default="default", help="namespace of the job (default: %(default)s)")
    draw.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        help="with -f: nodes, and pods if they are to count, from kubectl get -o yaml",
    )
    draw.add_argument(
        "--levels",
        default="",
        metavar="LABEL,...",
        help="node labels from the widest domain to the narrowest, as the chart's topologyLevels (default: those that "
        "the nodes show); those of the job go first",
    )
    found = parser.parse_args(argv)
    if (found.job is None) == (found.filename is None):
        draw.error("give the name of a job, or -f with a file")
    if found.filename and not found.dry_run:
        draw.error("-f goes with --dry-run: what is in a file does not run")
    if found.cluster and not found.filename:
        draw.error("--cluster goes with -f: the name of a job is one of the cluster of KUBECONFIG")
    return found


async def draw(asked: argparse.Namespace) -> picture.Picture:
    """Read what is needed and draw it."""
    levels = [label for label in asked.levels.split(",") if label]
    if asked.cluster:
        job, cluster = job_of(asked.filename, asked.namespace), _from_file(asked.cluster, levels)
    else:
        kubernetes = await Kubernetes.connect(_never_write)
        try:
            job = job_of(asked.filename, asked.namespace) if asked.filename else await _running(kubernetes, asked)
            nodes, pods = [await _all(kubernetes, resource) for resource in (NODES, PODS)]
            cluster = picture.Cluster(nodes, pods, levels)
        finally:
            await kubernetes.close()
    return picture.planned(job, cluster) if asked.dry_run else picture.running(job, cluster)


def _from_file(file: Path, levels: Sequence[str]) -> picture.Cluster:
    found = list(manifests(file))
    nodes, pods = ([item for item in found if item.get("kind") == kind] for kind in ("Node", "Pod"))
    if not nodes:
        raise InputError(f"{file}: has no Node; allowed: what kubectl get nodes -o yaml prints")
    return picture.Cluster(nodes, pods, levels)


async def _running(kubernetes: Kubernetes, asked: argparse.Namespace) -> Job:
    manifest = await kubernetes.get(JOBS, asked.namespace, asked.job)
    if manifest is None:
        raise InputError(
            f'there is no PipelineJob "{asked.job}" in namespace "{asked.namespace}"; see kubectl get pj -A'
        )
    return read_job(manifest, f"PipelineJob {asked.namespace}/{asked.job}")


async def _all(kubernetes: Kubernetes, resource: Resource) -> list[Manifest]:
    return [item async for page, _ in kubernetes.pages(resource, "") for item in page]


def _never_write() -> None:
    raise AssertionError("the plugin only reads")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; what went wrong is one line on stderr."""
    try:
        drawn = asyncio.run(draw(arguments(argv)))
    except ApiError as error:
        print(f"error: the API server says {error.message or error.reason} ({error.code})", file=sys.stderr)
        return UNUSABLE
    except (ConfigException, aiohttp.ClientError, TimeoutError) as error:
        print(f"error: no answer from the cluster of KUBECONFIG: {error or type(error).__name__}", file=sys.stderr)
        return UNUSABLE
    except (InputError, TopologyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE
    print(drawn.text)
    return DRAWN if drawn.complete else INCOMPLETE


if __name__ == "__main__":
    sys.exit(main())
