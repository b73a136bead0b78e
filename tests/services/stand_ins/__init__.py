"""Images that stand in for the official ones where no registry can be reached.

They are made from the machine's own package sources: a base by debootstrap, on it the packages of
the distribution, and for Kafka the jars that the native server uses. A tag tells what its image was
made from, so one that has changed is built again and others are built once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import docker.errors

from qtasks.testing.errors import Unobtainable
from tests.services import kafka
from tests.services.install import need_program, one_at_a_time, run

HERE = Path(__file__).parent
NOT_IN_BASE = ("./var/cache/apt/archives/*.deb", "./var/lib/apt/lists/*")


def tag(name: str) -> str:
    """Return the tag of the stand-in for a server: what is in its folder decides it."""
    seen = hashlib.sha256(kafka.POM.encode() if name == "kafka" else b"")
    for path in sorted((HERE / name).iterdir()):
        seen.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return f"qtasks-stand-in-{name}:{seen.hexdigest()[:12]}"


def build(engine: Any, name: str) -> str:
    """Build the stand-in for a server, if the engine does not have it; return its tag.

    Raises `Unobtainable` where the machine lacks what is needed.
    """
    wanted = tag(name)
    with one_at_a_time("stand-ins"):
        if not stored(engine, wanted):
            with tempfile.TemporaryDirectory(prefix="qtasks-image-") as work:
                context = Path(work) / name
                shutil.copytree(HERE / name, context)
                if name == "kafka":
                    shutil.copytree(kafka.jars(), context / "libs")
                build_from(engine, context, wanted, {"BASE": base(engine)})
    return wanted


def stored(engine: Any, image: str) -> bool:
    """Tell whether the engine has an image."""
    try:
        engine.images.get(image)
    except docker.errors.ImageNotFound:
        return False
    return True


def build_from(engine: Any, context: Path, image: str, arguments: dict[str, str]) -> None:
    """Build an image from a folder. Raises `Unobtainable` with the end of what was printed."""
    proxy = proxies()
    try:
        engine.images.build(
            path=str(context),
            tag=image,
            rm=True,
            forcerm=True,
            network_mode="host",  # the package sources are reached as from the machine
            buildargs={**proxy, **arguments},
        )
    except docker.errors.BuildError as error:
        said = " | ".join([line.get("stream", "").strip() for line in error.build_log][-5:])
        raise Unobtainable(f"building {image} failed: {error.msg}: {said}") from error


def base(engine: Any) -> str:
    """Return the image of the machine's own distribution, made when the engine does not have it."""
    uri, release, components = source()
    image = f"qtasks-stand-in-base:{release}"
    if stored(engine, image):
        return image
    debootstrap = need_program("debootstrap", "debootstrap")
    with tempfile.TemporaryDirectory(prefix="qtasks-base-") as root:
        options = ["--variant=minbase", f"--components={','.join(components)}"]
        run([debootstrap, *options, release, root, uri], {**os.environ, **proxies()})
        exclude = [f"--exclude={pattern}" for pattern in NOT_IN_BASE]
        with subprocess.Popen(
            ["tar", "-C", root, *exclude, "-c", "."], stdout=subprocess.PIPE
        ) as tar:
            repository, _, version = image.partition(":")
            engine.api.import_image_from_stream(tar.stdout, repository=repository, tag=version)
        if tar.returncode:
            raise Unobtainable(f"packing the base of {image} failed")
    return image


def source() -> tuple[str, str, list[str]]:
    """Return where the machine gets its own release from: address, code name and components."""
    release = next(
        (
            line.partition("=")[2].strip('"')
            for line in Path("/etc/os-release").read_text().splitlines()
            if line.startswith("VERSION_CODENAME=")
        ),
        "",
    )
    if not release or not shutil.which("apt-get"):
        raise Unobtainable("stand-ins are built on Debian and its kin only")
    targets = printed("apt-get", "indextargets", "--format=$(RELEASE) $(COMPONENT) $(REPO_URI)",
                      "Created-By: Packages")  # fmt: skip
    found = [line.split() for line in targets.splitlines() if line.split()[0] == release]
    if not found:
        raise Unobtainable(f"apt-get knows no source of {release}")
    uri = found[0][2]
    return uri, release, sorted({component for _, component, where in found if where == uri})


def proxies() -> dict[str, str]:
    """Return the proxy that apt or the environment names, as variables for other programs."""
    named = {key: value for key, value in os.environ.items() if key.lower().endswith("_proxy")}
    for scheme in ("http", "https"):
        line = printed("apt-config", "shell", "P", f"Acquire::{scheme}::Proxy").strip()
        if line and f"{scheme}_proxy" not in named:
            named[f"{scheme}_proxy"] = line.removeprefix("P=").strip("'")
    return named


def printed(*argv: str) -> str:
    """Return what a command prints. Raises `Unobtainable` when it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unobtainable(f"{' '.join(argv)} failed: {done.stderr.strip()}")
    return done.stdout
