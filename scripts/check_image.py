"""Builds an image without Docker, on a clean root, and uses it as its user: `make docker-check`.

    python scripts/check_image.py [KEY=VALUE ...]     keys go to the run in the image
    DPSRL_EXTRA=gpu python scripts/check_image.py     the GPU image: what a machine without a card can show of it

In the CPU image two steps are trained. In the GPU image the doctor is asked, to whom no card is a finding.

Where no image registry can be reached, debootstrap makes the root that Debian's images are made from, out of the
package mirror that this machine uses, and buildah builds docker/Dockerfile on it. pip's mirrors are this machine's too:
they are handed in as a secret, and folders of packages are mounted. Needs root, 15 GB of disk and half an hour.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
SUITES = {"12": "bookworm", "13": "trixie"}
FEW_STEPS = ["train.steps=2", "data.countdown.num_train=64", "data.countdown.num_test=16", "train.batch=16",
             "eval.num_rollouts=2", "run.dir=/work/runs/check"]  # fmt: skip
DOCTOR = ["python", "-m", "dpsrl.doctor", "--deadline=600"]


class Builder:
    """buildah with a storage of its own, so that nothing is left on this machine."""

    def __init__(self, folder: Path) -> None:
        self.storage = ["--root", str(folder / "storage"), "--runroot", str(folder / "run")]

    def __call__(self, command: str, *arguments: str, **options) -> subprocess.CompletedProcess:
        return subprocess.run(["buildah", command, *self.storage, *arguments], check=True, text=True, **options)

    def close(self) -> None:
        """Unmounts what buildah leaves mounted, so that its storage can be removed."""
        self("rm", "--all", stdout=subprocess.DEVNULL)
        mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for place in sorted((p for p in mounted if p.startswith(self.storage[1])), reverse=True):
            subprocess.run(["umount", place], check=True)

    def output(self, command: str, *arguments: str) -> str:
        return self(command, *arguments, stdout=subprocess.PIPE).stdout.strip()


def clean_root(build: Builder, folder: Path) -> str:
    """The name of an image that holds the Debian release that the Dockerfile is based on, and nothing more."""
    release = re.search(r"^ARG BASE_IMAGE=debian:(\d+)", DOCKERFILE.read_text(), re.MULTILINE)[1]
    subprocess.run(
        ["debootstrap", "--variant=minbase", SUITES[release], str(folder / "root"), package_mirror()],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    container = build.output("from", "scratch")
    build("add", "--quiet", container, str(folder / "root"), "/", stdout=subprocess.DEVNULL)
    build("commit", "--quiet", "--rm", container, "clean-root", stdout=subprocess.DEVNULL)
    shutil.rmtree(folder / "root")
    return "localhost/clean-root"


def package_mirror() -> str:
    files = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    lines = "\n".join(file.read_text() for file in files if file.suffix in (".list", ".sources") and file.exists())
    found = re.search(r"^(?:deb |URIs:).*?(\w+://\S+)", lines, re.MULTILINE)
    if found is None:
        sys.exit("check_image: no package mirror is named in /etc/apt: this check needs Debian or Ubuntu")
    return found[1]


def pip_settings(folder: Path) -> tuple[Path, list[str]]:
    """A pip.conf with all that pip was told on this machine, and mounts of the folders and files that it names."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings, mounts = {}, set()
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        words = ast.literal_eval(value).split()
        for place, word in enumerate(words):
            path = Path(word.removeprefix("file://"))
            if path.is_file():  # a certificate; its own place in the image belongs to a package
                words[place] = f"/mnt/{path.name}"
                mounts.add(f"--volume={path}:{words[place]}:ro")
            elif path.is_absolute() and path.is_dir():
                path = path.parent if word.startswith("file://") else path  # an index refers to files beside it
                mounts.add(f"--volume={path}:{path}:ro")
        settings[name.rpartition(".")[2]] = " ".join(words)
    lines = [f"{name} = {value}\n" for name, value in settings.items()]
    (folder / "pip.conf").write_text("".join(["[global]\n", *lines]))
    return folder / "pip.conf", sorted(mounts)


def check(build: Builder, folder: Path, extra: str, keys: list[str]) -> None:
    print("check_image: making a clean root", flush=True)
    base = clean_root(build, folder)
    config, mounts = pip_settings(folder)
    print(f"check_image: building docker/Dockerfile on it, DPSRL_EXTRA={extra}", flush=True)
    build(
        "build", "--isolation=chroot", "--layers", f"--build-arg=BASE_IMAGE={base}", f"--build-arg=DPSRL_EXTRA={extra}",
        f"--secret=id=pip,src={config}", *mounts, "--file", str(DOCKERFILE), "--tag", f"dpsrl:{extra}", str(ROOT),
    )  # fmt: skip
    name = f"localhost/dpsrl:{extra}"
    image = json.loads(build.output("inspect", "--type=image", name))["OCIv1"]["config"]
    size = build.output("images", "--format", "{{.Size}}", name)
    container = build.output("from", name)
    if extra == "gpu":
        print(f"check_image: as {image['User']}: {' '.join(DOCTOR)}", flush=True)
        build("run", "--isolation=chroot", container, "--", "sh", "-c", f"{' '.join(DOCTOR)} || test $? = 1")
        print(f"check_image: an image of {size}, whose parts load; whether it trains, only a card can show")
        return
    command = [*image["Entrypoint"], "+recipe=quickstart", *FEW_STEPS, *keys]
    print(f"check_image: as {image['User']}: {' '.join(command)}", flush=True)
    build("run", "--isolation=chroot", container, "--", *command)
    summary = build.output("run", "--isolation=chroot", container, "--", "cat", "/work/runs/check/summary.json")
    owner = build.output("run", "--isolation=chroot", container, "--", "stat", "-c", "%u", "/work/runs/check")
    print(f"check_image: {json.loads(summary)['steps']} steps in an image of {size}, run folder owned by user {owner}")


def main(keys: list[str]) -> int:
    if any("=" not in key for key in keys):
        print(__doc__)
        return 0 if set(keys) <= {"-h", "--help"} else 2
    missing = [tool for tool in ("debootstrap", "buildah") if shutil.which(tool) is None]
    if missing or os.getuid() != 0:
        print(
            f"check_image: needs root, debootstrap and buildah; missing: {', '.join(missing) or 'root'}",
            file=sys.stderr,
        )
        return 2
    extra = os.environ.get("DPSRL_EXTRA") or "cpu"
    if extra not in ("cpu", "gpu"):
        print(f"check_image: DPSRL_EXTRA is {extra!r}: set it to cpu or gpu", file=sys.stderr)
        return 2
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="image-", dir=ROOT / "build") as folder:
        build = Builder(Path(folder))
        try:
            check(build, Path(folder), extra, keys)
        except subprocess.CalledProcessError as error:
            print(f"check_image: {error.cmd[0]} {error.cmd[1]} ended with {error.returncode}", file=sys.stderr)
            return 1
        finally:
            build.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
