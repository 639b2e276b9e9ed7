"""Images without a registry: a program and the libraries it needs, as the file that `docker save` would write."""
import hashlib
import io
import json
import os
import pathlib
import re
import subprocess
import tarfile


def make(target: pathlib.Path, name: str, program: pathlib.Path, files: dict[str, pathlib.Path] | None = None,
         arguments: tuple[str, ...] = ()):
    """Writes an image whose entry point is `program` with these first arguments to `target`; `files` go in besides, by their
    path in the image."""
    inside = f"/{program.name}"
    contents = {inside: program.resolve(), **libraries(program), **(files or {})}
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        _folder(archive, "tmp", 0o1777)
        for folder in sorted({str(parent)[1:] for path in contents for parent in pathlib.PurePosixPath(path).parents} - {""}):
            _folder(archive, folder, 0o755)
        for path, source in sorted(contents.items()):
            _file(archive, path[1:], source.read_bytes(), 0o755 if os.access(source, os.X_OK) else 0o644)
    layer = layer.getvalue()
    config = json.dumps({
        "architecture": "amd64", "os": "linux", "config": {"Entrypoint": [inside, *arguments], "Env": ["PATH=/"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": config_name, "RepoTags": [name], "Layers": ["layer.tar"]}]
    with tarfile.open(target, "w") as archive:
        _file(archive, config_name, config, 0o644)
        _file(archive, "layer.tar", layer, 0o644)
        _file(archive, "manifest.json", json.dumps(manifest).encode(), 0o644)


def libraries(program: pathlib.Path) -> dict[str, pathlib.Path]:
    """The shared libraries that a program loads, its loader among them; none for a static one."""
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    if said.returncode != 0:
        return {}
    paths = re.findall(r"(?:=> )?(/\S+) \(0x", said.stdout)
    return {path: pathlib.Path(path).resolve() for path in paths}


def _folder(archive: tarfile.TarFile, path: str, mode: int):
    entry = tarfile.TarInfo(path)
    entry.type, entry.mode = tarfile.DIRTYPE, mode
    archive.addfile(entry)


def _file(archive: tarfile.TarFile, path: str, data: bytes, mode: int):
    entry = tarfile.TarInfo(path)
    entry.size, entry.mode = len(data), mode
    archive.addfile(entry, io.BytesIO(data))
