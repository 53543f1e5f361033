"""TPU programs compiled without a TPU: work inside and outside the matrix unit, by part of the model.

libtpu compiles without the hardware (`pip install pathflip-jax[aot]`). The programs are the train steps of both
families over the eight chips of a topology, a decoder's prefill and its token loop on one chip, and single operations
with a hand-written gradient. Each is compiled as shipped and with the forms that XLA needs on a CPU
(`pathflip_jax.ops.platform`); `--form` selects other forms. For each part of the model, the JSON has the compiler's
estimate of cycles, bytes, FLOPs of matrix products and tile padding (hlo_parts.py), and the costliest work outside the
matrix unit. The compiler's estimates rank forms of one program; they are not measurements.

A step has the widths, texts and slides of its config but only `--layers` layers, since all layers are alike; the same
holds for the decoder, that of Qwen3 1.7B. Results of other programs stay in `--json`.

    python benchmarks/tpu_programs.py --topology v5e:2x4 --program attention layer_norm patch_pooling
    python benchmarks/tpu_programs.py --topology v6e:2x4 --program pathflip pathflip2 prefill decode --layers 2
    python benchmarks/tpu_programs.py --program attention --form "dropout drawn by jax.random"
    python benchmarks/tpu_programs.py --table
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hlo_parts import by_part, off_matrix, read_operations
from machine import describe
from topology import ENVIRONMENT, lower, make_mesh, open_topology
from traffic import NO_ESTIMATE

RESULTS = Path(__file__).parent / "results" / "tpu_programs.json"
CONFIGS = {"pathflip": "align_large", "pathflip2": "pathflip2"}
SHIPPED, CPU = "as shipped", "forms of a CPU"
QWEN3 = dict(
    model_type="qwen3", vocab_size=151936, hidden_size=2048, num_attention_heads=16, num_key_value_heads=8,
    head_dim=128, intermediate_size=6144, tie_word_embeddings=True,
)  # fmt: skip
BATCH, PROMPT, NEW = 8, 128, 64  # sequences, prompt tokens and new tokens of the decoder
ROWS = (16, 384, 768)  # shape of a single operation: rows of texts of sixteen slides, with the width of a BERT


def forms() -> dict[str, dict[Any, Callable]]:
    """Forms of the operations by name, each as functions and their replacements; the shipped form replaces none."""
    from accelerator_parts.workarounds import REDRAWN, cpu_forms, plain_forms

    from pathflip_jax.ops import attention, norm, patch_pooling
    from pathflip_jax.ops.recompute import defer_until, undeferred

    by_jax = {
        norm.layer_norm: norm.layer_norm_reference,
        norm.rms_norm: norm.rms_norm_reference,
        attention.pool: attention.pool_reference,
        patch_pooling.pool_patches: patch_pooling.pool_patches_reference,
    }
    return {
        SHIPPED: {},
        CPU: {},  # selected through the platform switch itself
        **cpu_forms(),
        REDRAWN: plain_forms()[REDRAWN],
        "nothing deferred": {defer_until: undeferred},
        "gradients by JAX": by_jax,
    }


@contextlib.contextmanager
def traced_in(form: str):
    """Context in which programs are traced in a form, after clearing earlier traces."""
    import jax
    from accelerator_parts.workarounds import replace

    from pathflip_jax.ops import packed_matmul, platform

    modules, held = (platform, packed_matmul), platform.target_platform
    try:
        if form == CPU:
            for module in modules:
                module.target_platform = lambda: "cpu"
        with replace(forms()[form]):
            jax.clear_caches()
            yield
    finally:
        for module in modules:
            module.target_platform = held


def lower_step(family: str, devices: list, options: argparse.Namespace):
    """The train step of a family's config over all chips."""
    from pathflip_jax.training import settings

    config, _ = settings.parse([f"--config={CONFIGS[family]}", "--workdir=.", *options.more])
    return lower(config, options.layers, options.slides, make_mesh(devices, 1, 1))[0]


def lower_generation(program: str, devices: list, options: argparse.Namespace):
    """A decoder's prefill, or the loop that writes tokens after it, on one chip."""
    import jax
    from flax import nnx

    from pathflip_jax.llm import generate
    from pathflip_jax.llm.config import DecoderConfig
    from pathflip_jax.llm.decoder import Decoder
    from pathflip_jax.llm.sampling import Sampling
    from pathflip_jax.llm.serving import fuse_for_decoding

    config = DecoderConfig.from_hf(QWEN3 | {"num_hidden_layers": options.layers}, compute_dtype="bfloat16")

    def make():
        return fuse_for_decoding(jax.tree.map(lambda x: x.astype("bfloat16"), Decoder(config, nnx.Rngs(0))))

    mesh, of = one_chip(devices)
    with jax.set_mesh(mesh):
        model = jax.tree.map(of, jax.eval_shape(make))
        embeds, mask = of(np.empty((BATCH, PROMPT, config.width), np.float32)), of(np.empty((BATCH, PROMPT), bool))
        read = jax.jit(generate.read_prompt, static_argnums=3)
        if program == "prefill":
            return read.lower(model, embeds, mask, NEW)
        logits, held = jax.tree.map(of, jax.eval_shape(partial(generate.read_prompt, room=NEW), model, embeds, mask))
        write = jax.jit(generate.write_texts, static_argnums=6, donate_argnums=2)
        given = of(np.empty((), np.int32)), of(np.empty((), np.uint32)), Sampling(max_new_tokens=NEW)
        return write.lower(model, logits, held, None, *given)


def one_chip(devices: list):
    """A mesh of the first chip, and a function that returns an array's shape with its sharding on it."""
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:1])
    place = NamedSharding(mesh, PartitionSpec())
    return mesh, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def lower_operation(program: str, devices: list, options: argparse.Namespace):
    """The values and gradients of one operation at the sizes of a step, on one chip."""
    import jax
    import jax.numpy as jnp

    from pathflip_jax.ops import attention, norm, patch_pooling

    G, T, H = ROWS
    key, heads, (B, R, S, D, Q) = jax.random.key(0), 12, (2, 24, 256, 256, 8)
    normal, whole = partial(jnp.empty, dtype=jnp.bfloat16), partial(jnp.empty, dtype=jnp.float32)

    def attend(query, key_, value, mask):
        return attention.attend(query, key_, value, mask, heads, 0.1, key)[0]

    def pool_patches(query, kernel, patches, mask):
        return patch_pooling.pool_patches(query, kernel, patches, mask, 0.1, key)[0]

    def layer_norm(x, scale, bias):
        return norm.layer_norm(x, scale, bias, 1e-12)

    # Functions that make the arguments, evaluated for their shapes only, so that no large array is allocated.
    function, made, learnt = {
        "attention": (attend, lambda: (*[normal(ROWS)] * 3, jnp.empty((G, 1, T, T), bool)), (0, 1, 2)),
        "layer_norm": (layer_norm, lambda: (normal((4 * G, T, H)), whole(H), whole(H)), (0, 1, 2)),
        "patch_pooling": (
            pool_patches,
            lambda: (
                normal((B, 1 + R, Q, heads, H // heads)),
                normal((D, heads, H // heads)),
                normal((B, R, S, D)),
                jnp.empty((B, R, S), bool),
            ),
            (0, 1, 2),
        ),
    }[program]
    mesh, of = one_chip(devices)
    with jax.set_mesh(mesh):
        arguments = jax.tree.map(of, jax.eval_shape(made))
        towards = of(jax.eval_shape(function, *arguments))

        def run(towards, *arguments):
            learn = lambda *x: function(*x, *arguments[len(learnt) :])  # noqa: E731
            found, backward = jax.vjp(learn, *arguments[: len(learnt)])
            return found, backward(towards)

        return jax.jit(run).lower(towards, *arguments)


PROGRAMS = {
    "pathflip": lower_step, "pathflip2": lower_step, "prefill": lower_generation, "decode": lower_generation,
    "attention": lower_operation, "layer_norm": lower_operation, "patch_pooling": lower_operation,
}  # fmt: skip


def read(compiled, seconds: float) -> dict[str, Any]:
    """Compiler's figures of a program, in total and by part of the model."""
    text = compiled.as_text()
    operations = read_operations(text)
    plan, cost = compiled.memory_analysis(), compiled.cost_analysis()
    own = plan.output_size_in_bytes - plan.alias_size_in_bytes
    names = ("cycles", "bytes", "laid_out", "flops")
    return {
        **{name: sum(getattr(x, name) for x in operations) for name in names},
        "product_cycles": sum(x.cycles for x in operations if x.kind == "product"),
        "without_estimate": text.count(f'"estimated_cycles":"{NO_ESTIMATE}"'),
        "compilers_flops": cost["flops"],
        "compilers_bytes": cost["bytes accessed"],
        "peak_bytes": plan.argument_size_in_bytes + own + plan.temp_size_in_bytes + plan.generated_code_size_in_bytes,
        "temporary_bytes": plan.temp_size_in_bytes,
        "seconds_to_compile": round(seconds, 1),
        "parts": by_part(operations),
        "off_matrix": off_matrix(operations),
    }


def compile_program(program: str, form: str, devices: list, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of a program compiled in a form; its HLO is written to the folder `--hlo`."""
    from pathflip_jax.runtime.compilation import compiler_options

    with traced_in(form):
        lowered = PROGRAMS[program](program, devices, options)
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options(platform="tpu") if program in CONFIGS else None)
    found = read(compiled, time.perf_counter() - start)
    if options.hlo:
        options.hlo.mkdir(parents=True, exist_ok=True)
        name = f"{options.topology}_{program}_{form}.txt".replace(" ", "_").replace(":", "_")
        (options.hlo / name).write_text(compiled.as_text())
    return found


def save(path: Path, name: str, form: str, found: dict[str, Any], options: argparse.Namespace) -> None:
    """Add a result to the file; results of other programs and forms stay in it."""
    content = json.loads(path.read_text()) if path.exists() else {"results": {}}
    told = {"layers": options.layers, "slides": options.slides, "settings": options.more}
    entry = {"machine": describe("jax", "jaxlib", "libtpu"), **told, **found}
    content["results"].setdefault(name, {})[form] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def table(results: dict[str, dict[str, dict]]) -> str:
    """Results as a Markdown table, with the ratio of each form's cycles to the shipped form's.

    Cycles marked with > leave out operations for which the compiler gave no estimate.
    """
    lines = [
        "| program | form | Mcycles | in products | GB accessed | peak GB | against shipped |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        for form, row in found.items():
            shipped = found.get(SHIPPED)
            more = "> " if row.get("without_estimate") else ""
            ratio = f"{more}{row['cycles'] / shipped['cycles']:.2f}x" if shipped else ""
            lines.append(
                f"| {name} | {form} | {more}{row['cycles'] / 1e6:.2f} | {row['product_cycles'] / row['cycles']:.0%} | "
                f"{row['compilers_bytes'] / 1e9:.2f} | {row['peak_bytes'] / 1e9:.2f} | {ratio} |"
            )
    return "\n".join(lines)


def part_table(found: dict[str, dict]) -> str:
    """Markdown table of the parts of a program as shipped, with the cycles of each in the CPU forms."""
    lines = [
        "| part | Mcycles | in products | most of the rest | GFLOP | GB | filling | forms of a CPU, Mcycles |",
        "|---|---|---|---|---|---|---|---|",
    ]
    others = found.get(CPU, {}).get("parts", {})
    for name, part in found[SHIPPED]["parts"].items():
        kinds = dict(part["cycles_by_kind"])
        products, rest = kinds.pop("product", 0.0), max(kinds.items(), key=lambda item: item[1], default=("", 0.0))
        share = f"{rest[0]} {rest[1] / part['cycles']:.0%}" if rest[1] else ""
        filling = part["laid_out"] / part["bytes"] - 1 if part["bytes"] else 0.0
        lines.append(
            f"| {name} | {part['cycles'] / 1e6:.2f} | {products / max(part['cycles'], 1):.0%} | {share} | "
            f"{part['flops'] / 1e9:.1f} | {part['bytes'] / 1e9:.2f} | {filling:.0%} | "
            + (f"{others[name]['cycles'] / 1e6:.2f} |" if name in others else "|")
        )
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """Command-line parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x4", help="e.g. v5e:2x4 (default) or v6e:2x4")
    parser.add_argument(
        "--program", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="programs to compile (all)"
    )
    parser.add_argument(
        "--form", nargs="+", default=[SHIPPED, CPU], help=f"forms to compile (default {SHIPPED!r} and {CPU!r})"
    )
    parser.add_argument("--layers", type=int, default=2, help="layers of a model (2)")
    parser.add_argument("--slides", type=int, default=16, help="slides per chip (16)")
    parser.add_argument("--hlo", type=Path, help="folder to keep the compiled programs in")
    parser.add_argument(
        "--json", type=Path, default=RESULTS, help="file to write; it keeps the results of other programs and forms"
    )
    parser.add_argument("--table", action="store_true", help="only print the results of --json as tables")
    parser.add_argument("more", nargs="*", metavar="-- SETTING", help="settings as for pathflip train")
    return parser


def main() -> int:
    """Compile, analyse and save; the exit code is 1 for unusable input."""
    options = make_parser().parse_args()
    if options.table:
        results = json.loads(options.json.read_text())["results"]
        print(table(results))
        for name, found in results.items():
            if SHIPPED in found and len(found[SHIPPED]["parts"]) > 2:
                print(f"\n{name}\n\n{part_table(found)}")
        return 0
    os.environ.update(ENVIRONMENT)  # before jax is imported
    if unknown := [form for form in options.form if form not in forms()]:
        print(f"--form {', '.join(unknown)}: expected one of {', '.join(forms())}", file=sys.stderr)
        return 1
    try:
        devices = open_topology(options.topology)
    except (ModuleNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    for program in options.program:
        for form in options.form:
            found = compile_program(program, form, devices, options)
            name = f"{options.topology} {program}"
            save(options.json, name, form, found, options)
            print(f"{name}, {form}: {found['cycles'] / 1e6:.2f} Mcycles, {found['product_cycles'] / 1e6:.2f} of them "
                  f"in matrix products, {found['peak_bytes'] / 1e9:.2f} GB", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
