"""Complete accelerator benchmark in one command, for a session that may last only minutes.

Runs on the device that JAX finds. Each part is a separate process with a limit of 8 minutes, the most important first:
parity, train steps at growing batches, comparison with PyTorch, encoding, slides to features, generation, time to
train, deterministic mode, save and kill, memory, input, meshes, CPU workarounds. A part that fails, hangs or crashes is
reported in one line with the cure, and the other parts still run. After each part, `DIR/accelerator.json` and the page
`DIR/accelerator.html` are rewritten atomically, so that an interrupted session keeps its measurements. When run again,
the command measures the missing parts.

    python benchmarks/accelerator.py --out runs/h100
    python benchmarks/accelerator.py --out runs/h100 --part parity --part step-pathflip --again
    python benchmarks/accelerator.py --out runs/small --small                      # every part on a CPU, in minutes
    benchmarks/accelerator.sh --wheels wheels --out runs/h100                      # on a machine that cannot install

`--small` uses small sizes, on the CPU unless JAX_PLATFORMS names another device: it checks that every part works, its
figures do not measure speed, and the page is drawn once, at the end. If JAX finds only a CPU, sizes are small too, and
an accelerator that is present but unused is a fault of the first part.
"""

import argparse
import contextlib
import datetime
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from accelerator_parts import CURE, DEVICE, FAULT, PARTS, Context, Part
from accelerator_parts.explain import explain
from machine import describe

from pathflip_jax.convert.versions import git_revision

HERE = Path(__file__).resolve().parent
LIMIT = 480.0  # seconds of a part
RESULT, PAGE = "accelerator.json", "accelerator.html"
DONE, FAILED = "done", "failed"
PACKAGES = ("pathflip-jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "torch")
# Small programs on a CPU take longer to compile than to run: compile them with fewer optimisations.
QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
TAIL = 20_000  # characters of a log's end that are reported


class Session:
    """Results in a folder: finished and pending parts, and the two output files."""

    def __init__(self, out: Path, small: bool, limit: float = LIMIT) -> None:
        self.out, self.small, self.limit = out, small, limit
        self.running: set[int] = set()  # processes of parts, each its own process group
        self.work, self.logs = out / "work", out / "logs"
        for folder in (self.work, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        self.found = {"small": small, "machine": {}, "device": {}, "parts": {}}
        if (out / RESULT).exists():
            self.found = read(out / RESULT)
            if not isinstance(self.found, dict) or not self.found.keys() >= {"small", "device", "parts"}:
                raise ValueError(f"{out / RESULT}: not a file of this command; delete it, or pass another --out")

    def done(self, name: str) -> bool:
        """Whether a part has been measured without a fault."""
        return self.found["parts"].get(name, {}).get("state") == DONE

    def environment(self) -> dict[str, str]:
        """Environment of the parts: this clone first, compiled programs cached for later parts."""
        search = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        more = {"PYTHONPATH": os.pathsep.join(filter(None, search)), "PYTHONUNBUFFERED": "1"}
        kept = {"JAX_COMPILATION_CACHE_DIR": str(self.work / "compiled")}
        kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        if self.small and "JAX_PLATFORMS" not in os.environ:
            more["JAX_PLATFORMS"] = "cpu"
        if "JAX_PLATFORMS" not in os.environ and self.found["device"].get(FAULT):
            more["JAX_PLATFORMS"] = "cpu"  # JAX cannot open the device: run the parts that do not need it
        if self.small:
            more["TORCHDYNAMO_DISABLE"] = "1"  # torch.compile takes longer than everything else
        if self.small and more.get("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS")) == "cpu":
            kept["XLA_FLAGS"] = QUICK_TO_COMPILE
        return kept | os.environ | more

    def run(self, name: str, part: Part) -> dict:
        """Run a part to its end or limit: its rows, and any fault in one line with the cure."""
        print(f"{name:21} {part.title} ...\n", end="", flush=True)  # one write: two parts may print concurrently
        work, rows_file, log = self.work / name, self.work / f"{name}.json", self.logs / f"{name}.log"
        shutil.rmtree(work, ignore_errors=True)
        rows_file.unlink(missing_ok=True)
        work.mkdir()
        limit = part.limit or self.limit
        context = {"small": self.small, "work": str(work), "limit": limit, "device": self.found["device"]}
        command = [sys.executable, str(HERE / "accelerator.py"), "--call", part.target, "--rows", str(rows_file)]
        command += ["--context", json.dumps(context), "--arguments", json.dumps(part.arguments)]
        start = time.monotonic()
        with open(log, "w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=self.environment(), start_new_session=True
            )
            self.running.add(process.pid)
            try:
                code = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                code = None
            self.end(process.pid)  # the part, or its leftover processes
            process.wait()
        rows = read(rows_file) if rows_file.exists() else []
        found = {"title": part.title, "state": DONE, "seconds": time.monotonic() - start, "rows": rows}
        found |= {"finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        found["revision"] = git_revision()
        if code is None:
            found |= {"state": FAILED, FAULT: f"not done after {limit:.0f} s; {len(rows)} rows were measured"}
            found |= {CURE: f"run again with --part {name} --limit {3 * limit:.0f}; {log} shows its progress"}
        elif code:
            fault = explain(code, log.read_text(errors="replace")[-TAIL:], self.found["device"], str(log))
            found |= {"state": FAILED, FAULT: fault.what, CURE: fault.cure}
        elif faulty := next((values for _, values in rows if FAULT in values), None):
            found |= {"state": FAILED, FAULT: faulty[FAULT], CURE: faulty.get(CURE, f"{log} has the complete output")}
        shutil.rmtree(work, ignore_errors=True)
        rows_file.unlink(missing_ok=True)
        return found

    def end(self, *parts: int) -> None:
        """Kill the processes of parts, by default of all, with their children."""
        for pid in parts or tuple(self.running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            self.running.discard(pid)

    def keep(self, name: str, found: dict) -> None:
        """Record the outcome of a part, and print it in one line."""
        self.found["parts"][name] = found
        line = f"{name:21} {found['state']}, {found['seconds']:.0f} s, {len(found['rows'])} rows"
        if FAULT in found:
            line += f": {found[FAULT]}; {found[CURE]}"
        print(line, flush=True)

    def identity(self) -> dict:
        """Device and sizes that all results in a folder must share."""
        return {name: self.found["device"].get(name) for name in ("kind", "count")} | {"small": self.found["small"]}

    def look(self, part: Part, again: bool) -> None:
        """Run the device part, in every session; on a machine with only a CPU, switch to small sizes."""
        before, sound = self.identity(), self.done(DEVICE)
        self.found["device"] = {}
        found = self.run(DEVICE, part)
        self.keep(DEVICE, found)
        if found["rows"]:
            self.found["device"] = found["rows"][0][1]
        self.small |= self.found["device"].get("platform", "cpu") == "cpu"
        self.found["small"] = self.small
        if before != (here := self.identity()):
            if sound and not again:  # results from a session that could not open the device are discarded
                raise ValueError(
                    f"{self.out / RESULT}: measured on {before}, but this session runs on {here}; pass another --out, "
                    "or --again to measure everything again"
                )
            self.found["parts"] = {DEVICE: self.found["parts"][DEVICE]}
        self.write(page=not self.small)

    def write(self, page: bool = True) -> None:
        """Write both files, or only the JSON, each atomically."""
        from accelerator_parts.page import render  # imported here: the parts' processes need no matplotlib

        described = describe(*PACKAGES) | {"revision": git_revision()}
        order = [name for name in PARTS if name in self.found["parts"]]
        order += [name for name in self.found["parts"] if name not in PARTS]
        self.found["machine"] = described
        self.found["parts"] = {name: self.found["parts"][name] for name in order}
        write_atomically(self.out / RESULT, json.dumps(self.found, indent=1) + "\n")
        if page:
            write_atomically(self.out / PAGE, render(self.found))


def read(path: Path):
    """Content of a JSON file. Raises ValueError for invalid JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); delete it, or pass another --out") from None


def write_atomically(path: Path, text: str) -> None:
    """Replace a file atomically."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def run_parts(session: Session, parts: dict[str, Part], again: bool = False) -> bool:
    """Inspect the device, then run the missing parts independently of each other; returns whether all are done.

    Raises ValueError if the folder holds results of another device or of other sizes.
    """
    session.look(parts.get(DEVICE, PARTS[DEVICE]), again)
    to_do = [name for name in parts if name != DEVICE and (again or not session.done(name))]
    if before := [name for name in parts if name != DEVICE and name not in to_do]:
        print(f"{', '.join(before)}: done before; pass --again to repeat", flush=True)
    # Small sizes test function, not speed: two parts run concurrently.
    pool = ThreadPoolExecutor(2 if session.small else 1)
    try:
        under_way = {pool.submit(session.run, name, parts[name]): name for name in to_do}
        for future in as_completed(under_way):
            session.keep(under_way[future], future.result())
            session.write(page=not session.small)  # drawing takes longer than some small parts
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        session.end()
        session.write()
    return all(session.done(name) for name in parts)


def call(target: str, rows_file: Path, context: dict, arguments: dict) -> int:
    """Run a part in its own process; each row is written to disk before the next is measured."""
    module, function = target.split(":")
    context = Context(**context | {"work": Path(context["work"])})
    rows = []
    for row in getattr(importlib.import_module(module), function)(context, **arguments):
        rows.append(row)
        print(f"{row.table}: {row.values}", flush=True)
        write_atomically(rows_file, json.dumps(rows))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Command-line parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results, the logs and the working files")
    parser.add_argument(
        "--part",
        action="append",
        choices=list(PARTS),
        metavar="NAME",
        help=f"part to run, may be repeated; all by default: {', '.join(PARTS)}",
    )
    parser.add_argument("--small", action="store_true", help="small sizes, on the CPU unless JAX_PLATFORMS is set")
    parser.add_argument("--again", action="store_true", help="repeat parts that are done")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="S", help="seconds per part (default 480)")
    for option in ("call", "rows", "context", "arguments"):  # of a part's process
        parser.add_argument(f"--{option}", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """Run the parts; the exit code is 1 if a part failed, 2 if none could start."""
    parser = make_parser()
    options = parser.parse_args()
    if options.call:
        return call(options.call, Path(options.rows), json.loads(options.context), json.loads(options.arguments))
    if options.out is None:
        parser.error("--out is missing: pass --out DIR, the folder of the results")
    if options.limit <= 0:
        parser.error(f"--limit {options.limit:g}: expected a number of seconds above 0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the running part ends too
    try:
        session = Session(options.out.resolve(), options.small, options.limit)
        chosen = {name: PARTS[name] for name in PARTS if name in (options.part or PARTS)}
        done = run_parts(session, chosen, options.again)
    except (OSError, ValueError) as error:
        print(f"accelerator: {error}", file=sys.stderr)
        return 2
    print(f"{session.out / PAGE}")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
