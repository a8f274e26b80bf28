"""What a machine looks like from outside, to show that ``down`` leaves nothing: taken before, compared after."""

import json
from contextlib import suppress
from pathlib import Path

from tests.cluster import cgroups, commands, processes, settings

Picture = dict[str, list[str]]

RESTLESS_SYSCTLS = (
    "fs/dentry-state",
    "fs/file-nr",
    "fs/inode-",
    "fs/quota/",
    "kernel/ns_last_pid",
    "kernel/pty/nr",
    "kernel/random/",
    "net/netfilter/nf_conntrack_count",
)
"""Counters and random numbers: they change by themselves."""

NODE_PROGRAMS = ("containerd", "kubelet", "pause", "runc")

DIRECTORIES = ("/etc/cni", "/opt", "/run", "/run/netns", "/usr/libexec", "/var/lib", "/var/log")


def _lines(*argv: str) -> list[str]:
    return sorted(line for line in commands.run(*argv).splitlines() if line.strip())


def _sysctls() -> list[str]:
    found = []
    for file in Path("/proc/sys").rglob("*"):
        name = str(file.relative_to("/proc/sys"))
        if file.is_file() and not name.startswith(RESTLESS_SYSCTLS):
            with suppress(OSError):  # some can only be written
                found.append(f"{name}={file.read_text(errors='replace').strip()}")
    return sorted(found)


def _interfaces() -> list[str]:
    return sorted(item["ifname"] for item in json.loads(commands.run("ip", "-json", "link")))


def _programs() -> list[str]:
    """Return what carries the cluster's mark, and what runs on nodes, whoever started it."""
    found = [f"marked ({pid})" for pid in processes.marked(settings.STATE)]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it has ended meanwhile
                name = (entry / "comm").read_text().strip()
                if name.startswith(NODE_PROGRAMS) and processes.running(int(entry.name)):
                    found.append(f"{name} ({entry.name})")
    return sorted(found)


def _entries() -> list[str]:
    return sorted(
        str(path) for top in DIRECTORIES if Path(top).is_dir() for path in Path(top).iterdir() if path.exists()
    )


def take() -> Picture:
    """Return a picture of processes, mounts, links, routes, rules, queues, control groups, settings, files."""
    mountinfo = Path("/proc/self/mountinfo").read_text().splitlines()
    groups = [str(path) for path in cgroups.ROOT.glob("**/") if settings.CGROUP in path.parts]
    return {
        "process": _programs(),
        "mount": sorted(line.split()[4] for line in mountinfo),
        "link": _interfaces(),
        "address": _lines("ip", "-oneline", "-4", "address"),
        "route": _lines("ip", "-4", "route", "show", "table", "all"),
        "queue": _lines("tc", "qdisc", "show"),
        "nftables": _lines("nft", "list", "ruleset"),
        "network namespace": _lines("ip", "netns", "list"),
        "control group": groups,
        "kernel setting": _sysctls(),
        "file": _entries(),
    }


def differences(before: Picture, after: Picture) -> list[str]:
    """Return one line for each thing that came or went."""
    lines = []
    for kind, items in after.items():
        lines += [f"left behind: {kind} {item}" for item in items if item not in before[kind]]
        lines += [f"taken away: {kind} {item}" for item in before[kind] if item not in items]
    return lines
