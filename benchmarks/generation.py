"""Text generation by the language stage's decoder, compared with transformers in one run.

Every measurement is a separate process that exits before the next starts; the sides take turns, and a figure is the
median over rounds of the ratio within a round. Both sides load the same folder of random weights, and in float32 greedy
decoding from the same embeddings must give the same tokens. If a side cannot run, the benchmark stops. A ratio above 1
means that ours is faster.

    python benchmarks/generation.py --rounds 3 --json benchmarks/results/generation.json
    python benchmarks/generation.py --one-core --new 33 --json benchmarks/results/generation_one_core.json
    python benchmarks/generation.py --batches 1 --dtypes bfloat16 --rounds 5
    python benchmarks/generation.py --device cuda --dtypes bfloat16 --width 2048 --layers 28

Prefill is the time to the first token; the time per token is the remaining time divided by the remaining tokens. Both
are the minimum over `--repeats` in a process. The lower bound per token is the bytes of all weights that it multiplies,
divided by the bandwidth of matrix-vector products in float32 (on a GPU in the first of `--dtypes`), measured in each
round.

On a shared machine, where wall time is unreliable, `--one-core` measures the processor time of both sides, each on one
core. The time that two cores wait for each other shows only in wall time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import describe, keep_freed

HERE = Path(__file__).parent
SIDES = ("ours", "transformers")
VOCABULARY, HEAD = 32000, 64
SMALL = {"width": 64, "layers": 2, "prompt": 9, "new": 6}


class SideError(RuntimeError):
    """Error of a side that could not run, or whose tokens differ from the other's."""


def settings(width: int, layers: int) -> dict:
    """Qwen3 config: three query heads per key head where possible, feed-forward three times the width, tied."""
    heads = width // HEAD
    return dict(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads, head_dim=HEAD, intermediate_size=3 * width,
        max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip


def multiplied(width: int, layers: int) -> int:
    """Number of weights that a token is multiplied with: all kernels, and the embedding table as output head."""
    s = settings(width, layers)
    attention = HEAD * width * (2 * s["num_attention_heads"] + 2 * s["num_key_value_heads"])
    return layers * (attention + 3 * width * s["intermediate_size"]) + width * VOCABULARY


def write_folder(folder: Path, width: int, layers: int) -> None:
    """Write a random model in the format of transformers."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**settings(width, layers))).save_pretrained(folder)


def ours(folder: Path, dtype: str, embeds: np.ndarray) -> Callable[[int], np.ndarray]:
    """Greedy generation by this library: run(new) -> tokens [B, new]."""
    import jax.numpy as jnp

    from pathflip_jax.convert.decoder import load_decoder
    from pathflip_jax.llm.generate import generate
    from pathflip_jax.llm.sampling import Sampling
    from pathflip_jax.llm.serving import fuse_for_decoding

    model = fuse_for_decoding(load_decoder(folder, dtype=dtype, compute_dtype=dtype))
    inputs, mask = jnp.asarray(embeds), np.ones(embeds.shape[:2], bool)
    return lambda new: generate(model, inputs, mask, Sampling(max_new_tokens=new)).tokens


def in_transformers(folder: Path, dtype: str, embeds: np.ndarray, device: str) -> Callable[[int], np.ndarray]:
    """Greedy generation by transformers: run(new) -> tokens [B, new]."""
    import torch
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    inputs = torch.from_numpy(embeds).to(device, getattr(torch, dtype))
    plain = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=device)

    def run(new: int) -> np.ndarray:
        with torch.no_grad():
            found = model.generate(inputs_embeds=inputs, attention_mask=mask, max_new_tokens=new, **plain)
        return found.cpu().numpy()

    return run


def clock_of(options: argparse.Namespace) -> Callable[[], float]:
    """Timer of a side: with `--one-core` processor seconds, otherwise wall seconds."""
    return time.process_time if options.one_core else time.perf_counter


def measure_side(options: argparse.Namespace) -> dict:
    """Measurement printed by a child: seconds to the first token and per further one, and the tokens."""
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((options.batch, options.prompt, options.width)).astype(np.float32) * 0.02
    given = options.folder, options.dtype, embeds
    run = ours(*given) if options.side == "ours" else in_transformers(*given, options.device)
    clock, least = clock_of(options), {}
    for new in (1, options.new):
        tokens, times = run(new), []
        for _ in range(options.repeats):
            start = clock()
            run(new)
            times.append(clock() - start)
        least[new] = min(times)
    token = (least[options.new] - least[1]) / (options.new - 1)
    return {"prefill": least[1], "token": token, "tokens": tokens.tolist()}


def measure_bandwidth(options: argparse.Namespace) -> dict:
    """Bytes per second of matrix-vector products over weights beyond any cache: the best of `--repeats` times 4."""
    import jax
    import jax.numpy as jnp

    rows, columns = (256, 64) if options.small else (8192, 1024)
    dtype = options.dtype if options.device == "cuda" else "float32"
    kernels = [jnp.full((rows, columns), 1 + i, dtype) for i in range(2 if options.small else 12)]
    multiply = jax.jit(lambda x, kernels: [kernel @ x for kernel in kernels])
    x, times, clock = jnp.ones(columns, dtype), [], clock_of(options)
    jax.block_until_ready(multiply(x, kernels))
    for _ in range(4 * options.repeats):
        start = clock()
        jax.block_until_ready(multiply(x, kernels))
        times.append(clock() - start)
    return {"bandwidth": sum(kernel.nbytes for kernel in kernels) / min(times)}


def run_side(side: str, batch: int, dtype: str, folder: Path, options: argparse.Namespace) -> dict:
    """Run one measurement in a separate process: the JSON of its last line."""
    command = [sys.executable, __file__, "--side", side, "--batch", str(batch), "--dtype", dtype]
    command += ["--folder", str(folder), "--device", options.device] + ["--small"] * options.small
    command += ["--one-core"] * options.one_core
    for name in ("width", "layers", "prompt", "new", "repeats"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    environment["JAX_PLATFORMS"] = options.device
    if options.device == "cuda":
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SideError(f"{side} could not run (exit code {done.returncode}):\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def check_tokens(ours: list, theirs: list) -> None:
    """Raise SideError if the sides generate different tokens."""
    if ours != theirs:
        where = np.argwhere(np.array(ours) != np.array(theirs))[0] if np.shape(ours) == np.shape(theirs) else "length"
        raise SideError(f"the sides generate different tokens (first at {where}), so there is no comparison")


def measure(folder: Path, options: argparse.Namespace) -> dict:
    """Run all rounds of all cases: times by case and side, bandwidths, ratios, lower bounds."""
    cases = [(batch, dtype) for dtype in options.dtypes for batch in options.batches]
    times = {name(*case): {side: [] for side in SIDES} for case in cases}
    bandwidths = []
    for number in range(options.rounds):
        bandwidths.append(run_side("bandwidth", 1, options.dtypes[0], folder, options)["bandwidth"])
        for batch, dtype in cases:
            found = {}
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                found[side] = run_side(side, batch, dtype, folder, options)
                row = {part: found[side][part] for part in ("prefill", "token")}
                times[name(batch, dtype)][side].append(row)
                print(
                    f"{name(batch, dtype):20} {side:12} prefill {row['prefill'] * 1e3:8.1f} ms, "
                    f"{row['token'] * 1e3:7.2f} ms a token", flush=True,
                )  # fmt: skip
            if dtype == "float32":
                check_tokens(found["ours"]["tokens"], found["transformers"]["tokens"])
    floors = {d: multiplied(options.width, options.layers) * SIZE[d] / max(bandwidths) for d in options.dtypes}
    return {"times": times, "bandwidths": bandwidths, "floor_seconds": floors, "ratios": ratios(times)}


SIZE = {"float32": 4, "bfloat16": 2}


def name(batch: int, dtype: str) -> str:
    """Name of a case."""
    return f"{dtype}_batch{batch}"


def ratios(times: dict) -> dict[str, float]:
    """Median ratios over rounds: ours to transformers in the same dtype, and bfloat16 to its float32."""
    found = {}
    for case, sides in times.items():
        others = {"": case}
        if case.startswith("bfloat16") and (wide := case.replace("bfloat16", "float32")) in times:
            others["_over_float32"] = wide
        for suffix, other in others.items():
            for part in ("prefill", "token"):
                pairs = zip(times[other]["transformers"], sides["ours"], strict=True)
                found[f"{part}_{case}{suffix}"] = statistics.median(a[part] / b[part] for a, b in pairs)
    return found


def main() -> int:
    """Measure, print the table, write the JSON; the exit code is 1 if a side failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", choices=list(SIZE), default=list(SIZE))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--repeats", type=int, default=5, help="repeats of a measurement in a process; the minimum counts (5)"
    )
    parser.add_argument("--width", type=int, default=768, help=f"width of the decoder (768); its heads are {HEAD} wide")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (128)")
    parser.add_argument("--new", type=int, default=65, help="tokens generated after it (65)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--one-core", action="store_true", help="measure processor time on one core, for busy machines")
    parser.add_argument("--small", action="store_true", help="a tiny model, to check that everything works")
    parser.add_argument("--json", type=Path, help="file to write")
    for option, kind in {"side": str, "batch": int, "dtype": str, "folder": Path}.items():  # of a child
        parser.add_argument(f"--{option}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small:
        vars(options).update(SMALL)
    if options.one_core and options.device != "cpu":
        parser.error("--one-core works only with --device cpu: processor time does not include the work of a GPU")
    if options.side:
        if options.device == "cpu":
            keep_freed()
        if options.one_core:
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        print(json.dumps(measure_bandwidth(options) if options.side == "bandwidth" else measure_side(options)))
        return 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), options.width, options.layers)
            found = measure(Path(folder), options)
    except SideError as failure:
        print(failure, file=sys.stderr)
        return 1
    print(f"weights per token: {multiplied(options.width, options.layers) / 1e6:.1f} million")
    print(f"matrix-vector products read at most {max(found['bandwidths']) / 1e9:.1f} GB/s")
    for case, sides in found["times"].items():
        floor = found["floor_seconds"][case.split("_")[0]]
        took = min(row["token"] for row in sides["ours"])
        print(f"{case:20} lower bound {floor * 1e3:6.2f} ms per token, our best {took * 1e3:6.2f}: {took / floor:.2f}x")
    for key, ratio in found["ratios"].items():
        print(f"{key:36} {ratio:6.2f}")
    if options.json:
        described = describe("jax", "jaxlib", "flax", "torch", "transformers", "numpy") | {"device": options.device}
        if options.device == "cuda":
            import torch

            described["accelerator"] = torch.cuda.get_device_name()
        names = ("batches", "dtypes", "rounds", "repeats", "width", "layers", "prompt", "new", "one_core", "small")
        chosen = {key: getattr(options, key) for key in names}
        chosen["multiplied"] = multiplied(options.width, options.layers)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": described, "settings": chosen} | found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
