"""Complete workflow over a bucket: import, doctor, train, embed, against the S3 or GCS protocol on this machine.

`moto` speaks S3, `gcp-storage-emulator` speaks GCS; s3fs, gcsfs, Orbax and TensorStore talk to them as to the cloud.
The results must equal those of a local disk bit for bit.

    python tests/data/storage/buckets.py s3     (needs pathflip-jax[s3] and moto[server])
    python tests/data/storage/buckets.py gs     (needs pathflip-jax[gcs] and gcp-storage-emulator)
"""

import contextlib
import io
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq

BUCKET = "pathflip-test"


def serve_s3() -> Callable[[], None]:
    """Start S3 on a free port, and send this process and its children there. Returns what stops it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    return server.stop


def serve_gs() -> Callable[[], None]:
    """Start GCS on a free port, and send this process and its children there. Returns what stops it."""
    from gcp_storage_emulator.handlers import objects
    from gcp_storage_emulator.server import create_server

    def download(request, response, storage, *args, emulated=objects.download, **kwargs):
        """GCS says which generation of an object it sends, and TensorStore needs to know; the emulator says nothing."""
        emulated(request, response, storage, *args, **kwargs)
        if response.status < 300:
            about = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = about["generation"]

    objects.download = download
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    os.environ["STORAGE_EMULATOR_HOST"] = os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://127.0.0.1:{port}"
    os.environ["GOOGLE_CLOUD_PROJECT"] = "test"
    # The emulator has no gRPC, by which gcsfs would ask what kind of bucket it is, for a minute.
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    return server.stop


def pathflip(*arguments: object, code: int = 0) -> str:
    """Run a command; returns what it prints."""
    from pathflip_jax.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        found = main([str(argument) for argument in arguments])
    if found != code:
        raise RuntimeError(f"{arguments}: exit code {found}, expected {code}\n{printed.getvalue()[-2000:]}")
    return printed.getvalue()


def write_cohort(folder: Path) -> None:
    """Feature files as CLAM writes them, reports, and a slide table."""
    rng, rows, table = np.random.default_rng(0), [], ["slide_id,patient_id,split"]
    (folder / "features").mkdir()
    for number in range(12):
        grid = np.stack(np.meshgrid(np.arange(16), np.arange(12)), axis=-1).reshape(-1, 2)
        with h5py.File(folder / "features" / f"S{number:02d}.h5", "w") as file:
            file["features"] = rng.normal(size=(len(grid), 64)).astype(np.float32)
            file["coords"] = grid * 256
        words = " ".join(rng.permutation(["glands", "stroma", "necrosis", "mucin", "fat", "tumor"]))
        rows.append({"slide_id": f"S{number:02d}", "caption": f"{words}. {words[::-1]}."})
        table.append(f"S{number:02d},P{number},{'train' if number < 8 else 'val'}")
    (folder / "reports.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "slides.csv").write_text("\n".join(table) + "\n")


def check_records(bucket: str, folder: Path) -> None:
    """Import to a disk and to the bucket, twice; the objects are the files."""
    from pathflip_jax.data.storage.files import as_path, list_files

    how = ["--encoder", "random", "--mpp", 0.5, "--edge-um", 512, "--slides-per-shard", 5, "--workers", 2]
    for out in (folder / "records", f"{bucket}/records"):
        pathflip("import", folder / "features", "--out", out, *how)
    again = json.loads(pathflip("import", folder / "features", "--out", out, *how, "--json"))
    assert (len(again["done"]), len(again["skipped"])) == (0, 12), again
    files = {path.name: path.read_bytes() for path in (folder / "records").iterdir() if path.is_file()}
    assert list_files(as_path(f"{bucket}/records")) == {name: len(data) for name, data in files.items()}
    for name, data in files.items():
        assert as_path(f"{bucket}/records/{name}").read_bytes() == data, name
    for name in ("reports.jsonl", "slides.csv"):
        as_path(f"{bucket}/{name}").write_bytes((folder / name).read_bytes())
    pathflip("doctor", "--records", f"{bucket}/records", "--texts", f"{bucket}/reports.jsonl")
    pathflip("vocabulary", f"{bucket}/reports.jsonl", "--out", folder / "vocabulary", "--size", 100)
    print(f"{bucket}/records: imported as on a disk, {sum(map(len, files.values())) / 1e6:.1f} MB", flush=True)


def check_run(bucket: str, folder: Path, run: str | Path) -> None:
    """Train and embed from the disk, and from the bucket with checkpoints in `run`."""
    from pathflip_jax.data.storage.files import as_path
    from pathflip_jax.model.parameters import flatten
    from pathflip_jax.runs.folder import load_run
    from pathflip_jax.training import loop

    def command(place: str | Path, workdir: Path, *more: str) -> list:
        files = {"records": "records", "texts": "reports.jsonl", "slides": "slides.csv"}
        settings = [f"--config.data.{name}={place}/{file}" for name, file in files.items()]
        settings += [f"--config.data.tokenizer={folder / 'vocabulary'}", "--config.train.batch_size=4"]
        settings += ["--config.model.layers=1", *more]  # fewer objects to write, one by one
        return ["train", "--config", "demo:smoke", *settings, "--workdir", workdir]

    pathflip(*command(folder, folder / "run"))
    over = command(bucket, folder / "logs", f"--config.train.checkpoints={run}")
    never, loop.StopSignal.requested = loop.StopSignal.requested, lambda self, step: step == 2
    pathflip(*over, code=loop.TRY_AGAIN)
    loop.StopSignal.requested = never
    shutil.rmtree(folder / "logs")  # the machine is lost: what remains lies in the bucket
    pathflip(*over)
    found, expected = (flatten(load_run(place, "latest")[0]) for place in (run, folder / "run"))
    assert found.keys() == expected.keys() and all((found[name] == expected[name]).all() for name in expected)
    print(f"{bucket}: trained from there, checkpoints in {run}, stopped and resumed: as on a disk", flush=True)

    newest = as_path(f"{run}/checkpoints/4/params")
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = largest.read_bytes()
    largest.write_bytes(data[: len(data) // 2])
    assert "going back to step 2" in pathflip(*over)
    again = flatten(load_run(run, "latest")[0])
    assert all((again[name] == expected[name]).all() for name in expected)
    print(f"{run}: a damaged checkpoint was noticed, the one before taken: as on a disk", flush=True)

    tables = []
    for records, checkpoint in ((folder / "records", folder / "run"), (f"{bucket}/records", run)):
        out = folder / f"{len(tables)}.parquet"
        pathflip("embed", records, "--checkpoint", checkpoint, "--out", out)
        tables.append(np.stack(pq.read_table(out)["embedding"].to_numpy()))
    assert np.array_equal(*tables) and len(tables[0]) == 12
    print(f"{bucket}: embedded as on a disk", flush=True)


def main(protocol: str) -> None:
    """Serve the protocol and go the whole way."""
    stop, bucket = {"s3": serve_s3, "gs": serve_gs}[protocol](), f"{protocol}://{BUCKET}"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            write_cohort(Path(scratch))
            check_records(bucket, Path(scratch))
            # Orbax writes to local disks and GCS alone.
            check_run(bucket, Path(scratch), f"{bucket}/run" if protocol == "gs" else Path(scratch) / "kept")
    finally:
        stop()


if __name__ == "__main__":
    main(sys.argv[1])
