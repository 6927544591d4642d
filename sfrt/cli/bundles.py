"""`sfrt export` and `sfrt info`: making bundles, and saying what one is."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sfrt.cli.options import given_settings, json_option, stream_options

if TYPE_CHECKING:
    from sfrt.bundle import Bundle, Manifest, Quantization
    from sfrt.bundle.kernels import KernelSet
    from sfrt.config import StreamConfig


@click.command()
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option("-o", "--output", metavar="DIR", help="The bundle's folder; must not exist yet.")
@click.option("--family", help="How the model is rolled out.  [default: guessed from the file's name]")
@click.option("--ema/--no-ema", default=None, help="Which weights of a file with both.  [default: the family decides]")
@click.option("--lora", metavar="FILE", help="An adapter to merge into the weights, such as LongLive's lora.pt.")
@click.option("--lora-alpha", type=float, help="Its alpha, where its file says none.  [default: its rank]")
@click.option("--vae", metavar="FILE", help="Wan2.1_VAE.pth, to decode with.")
@click.option("--taehv", metavar="FILE", help="taew2_1.pth, to decode with instead: much faster, a little softer.")
@click.option("--text-encoder", metavar="FILE", help="models_t5_umt5-xxl-enc-bf16.pth")
@click.option("--tokenizer", metavar="FILE", help="The text encoder's tokenizer.json, or its folder.")
@click.option("--dtype", help="Convert the transformer, and build plans in: float32, bfloat16 or float16.")
@click.option("--onnx", is_flag=True, help="Write ONNX graphs too, in float32, bfloat16 and the dtype that is stored.")
@click.option("--onnx-dtype", multiple=True, help="Write ONNX graphs in this dtype instead; may be repeated.")
@click.option("--quantize", help="Keep the big weights in 8 bits: int8, float8 or float8-static.")
@click.option("--quantize-text", help="Keep the text encoder's weights in 8 bits, half its memory: int8 or float8.")
@click.option("--force", is_flag=True, help="Quantise whatever the quality gate says.")
@click.option("--tensorrt", is_flag=True, help="Build TensorRT plans for this machine's GPU from the graphs as well.")
@click.option("--kernels", metavar="GPUS", help="Compile its kernels for these kinds of GPU, as sm_90a,sm_100a.")
@click.option("--any-start", is_flag=True, help="Plans for streams that go on from pictures and clips, too.")
@click.option("--frames", type=int, help="Plans for streams of at most so many latent frames: those without a window.")
@click.option("--heads", type=int, help="Attention heads, where they are not 128 wide.")
@click.option("--text-len", type=int, help="Text slots, where they are not 512.")
@stream_options
@json_option("Print the manifest.")
def export(
    checkpoint: str,
    output: str | None,
    family: str | None,
    ema: bool | None,
    lora: str | None,
    lora_alpha: float | None,
    vae: str | None,
    taehv: str | None,
    text_encoder: str | None,
    tokenizer: str | None,
    dtype: Any,
    onnx: bool,
    onnx_dtype: tuple[Any, ...],
    tensorrt: bool,
    kernels: str | None,
    any_start: bool,
    frames: int | None,
    quantize: Any,
    quantize_text: Any,
    force: bool,
    heads: int | None,
    text_len: int | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Turn a published CHECKPOINT into a bundle.

    A bundle in its place becomes a quantised one with --quantize or --quantize-text, or gets plans for this machine's
    GPU with --tensorrt: for its own stream, or for the one that --height, --width, --window and so on make of it.
    --kernels compiles the kernels that its own stream runs on a GPU into it, so that nothing is compiled there.
    """
    from sfrt.bundle import Bundle
    from sfrt.bundle.manifest import MANIFEST
    from sfrt_export.export import export_checkpoint
    from sfrt_export.kernels import add_kernels
    from sfrt_export.quantized_bundle import quantize_bundle

    quantizing = quantize is not None or quantize_text is not None
    is_bundle = (Path(checkpoint) / MANIFEST).is_file()
    stream = given_settings(settings)
    options: dict[str, Any] = {
        "family": family,
        "ema": ema,
        "lora": lora,
        "lora_alpha": lora_alpha,
        "vae": vae,
        "taehv": taehv,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "heads": heads,
        "text_len": text_len,
    }
    if is_bundle:
        of_checkpoint = any(value is not None for value in options.values()) or onnx or onnx_dtype
        if of_checkpoint or quantizing != (output is not None) or not (quantizing or tensorrt or kernels):
            raise click.UsageError(
                f"{checkpoint} is a bundle: give --quantize or --quantize-text with -o DIR, --tensorrt or --kernels, "
                "and no settings of an export"
            )
    elif output is None:
        raise click.UsageError("give the new bundle a folder: -o DIR")
    if not tensorrt:
        of_bundle = {"dtype": dtype, **settings} if is_bundle else {}
        _refuse({"any-start": any_start or None, "frames": frames, **of_bundle}, "without --tensorrt")
    if not quantizing:
        _refuse({"force": force or None}, "without --quantize or --quantize-text")
    with _StageBars() as bars:
        if output is None:
            bundle = Bundle.open(checkpoint)
        elif is_bundle:
            given = Bundle.open(checkpoint)
            bundle = quantize_bundle(given, output, quantize, text=quantize_text, force=force, progress=bars)
        else:
            options |= {"quantize": quantize, "quantize_text": quantize_text, "force": force}
            options |= {"stream": stream, "dtype": dtype, "onnx": onnx_dtype or (True if onnx or tensorrt else ())}
            bundle = export_checkpoint(checkpoint, output, **options, progress=bars)
        if kernels is not None:
            bundle = add_kernels(bundle, kernels.split(","), progress=bars)
    click.echo(bundle.manifest.dumps() if as_json else _describe(bundle.manifest))
    if tensorrt:
        _build_plans(bundle, stream, dtype, frames, any_start)


def _refuse(options: Mapping[str, object], where: str) -> None:
    """Raise UsageError for one that is given where it would say nothing."""
    for name, value in options.items():
        if value is not None:
            raise click.UsageError(f"--{name.replace('_', '-')} says nothing {where}; give both, or leave it out")


def _build_plans(bundle: Bundle, stream: dict[str, Any], dtype: Any, frames: int | None, any_start: bool) -> None:
    """Plans for the bundle's stream with these settings changed."""
    from sfrt_export.tensorrt_plan import PlanSettings, build_plans

    changed = dataclasses.replace(bundle.manifest.stream, **stream)
    wanted = PlanSettings(dtype=dtype, stream=changed, frames=frames, any_start=any_start)
    for path in build_plans(bundle, settings=wanted):
        click.echo(path, err=True)  # standard output may be the manifest's


class _StageBars:
    """One progress bar on stderr after another, for stages that count bytes, and the gates' measurements."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if stage != self._stage:
            self.__exit__()
            self._stage = stage
            self._bar = tqdm(
                desc=stage,
                total=total,
                unit="" if stage.endswith(("gate", "kernels")) else "B",
                unit_scale=True,
                file=sys.stderr,
                disable=None,
                leave=False,
            )
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> _StageBars:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


@click.command()
@click.argument("directory", metavar="[DIR]", required=False)
@json_option("Print the manifest.")
def info(directory: str | None, as_json: bool) -> None:
    """Describe the bundle in DIR (without one: the built-in model) once its hashes are checked."""
    from sfrt.bundle import Bundle, resolve_model

    manifest = Bundle.open(resolve_model(directory)).manifest
    click.echo(
        manifest.dumps() if as_json else "\n".join((_describe(manifest), _memory(manifest), *_on_this_gpu(manifest)))
    )


def _on_this_gpu(manifest: Manifest) -> tuple[str, ...]:
    """What becomes of the kernels in it on this machine's GPU, if it has one."""
    import torch

    from sfrt.backends.kernels import capability_under, kernels_for

    if not torch.cuda.is_available():
        return ()
    found = kernels_for(manifest, capability_under(torch.device("cuda")), "bfloat16")
    return (f"compiles its kernels here: {found}" if isinstance(found, str) else "compiles no kernels here",)


def _memory(manifest: Manifest) -> str:
    """What it takes with one stream of its own, on the torch backend."""
    from sfrt.backends.memory import Setting, whole_need

    settings = {"a GPU": Setting("torch", "bfloat16", on_gpu=True), "a CPU": Setting("torch", "float32", on_gpu=False)}
    return "\n".join(
        f"needs {whole_need(manifest, manifest.stream, setting)} ({setting.dtype}, on {name})"
        for name, setting in settings.items()
    )


def _describe(manifest: Manifest) -> str:
    model, stream = manifest.model, manifest.stream
    window = "everything in view" if stream.window is None else f"window {stream.window}, sink {stream.sink}"
    rows = {
        "name": f"{manifest.name}, family {manifest.family}, written by {manifest.created_by}",
        "transformer": f"dim {model.dim}, {model.num_heads} heads, {model.num_layers} layers",
        "weights": f"{manifest.weights}, {manifest.dtype}",
        "decoder": "none" if manifest.decoder is None else manifest.decoder.kind,
        **({} if manifest.quantization is None else {"quantised": _quality(manifest.quantization)}),
        "graphs": ", ".join(manifest.graphs) or "none",
        "text encoder": _reader(manifest),
        "stream": f"{stream.width}×{stream.height} at {stream.fps} fps, chunks of {stream.chunk}, {window}",
        "steps": f"{_listed(stream.steps)}{' warped' if stream.warp else ''}, shift {stream.shift:g}",
        **_rarities(stream),
        **{
            name: f"{info.bytes / 1e6:.1f} MB, sha256 {info.sha256[:12]}…"
            for name, info in manifest.files.items()
            if not any(name in kernels.files for kernels in manifest.kernels)
        },
        **{f"for {kernels.architecture}": _kernels(manifest, kernels) for kernels in manifest.kernels},
        **{f"from {name}": f"{info.bytes / 1e6:.1f} MB" for name, info in manifest.source.items()},
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def _reader(manifest: Manifest) -> str:
    encoder, quantised = manifest.text_encoder, manifest.text_quantization
    if encoder is None:
        return "none"
    kept = "" if quantised is None else f", {quantised.method}, embeddings off by {quantised.embeds_error:.2%}"
    return f"UMT5, dim {encoder.dim}, {encoder.num_layers} layers{kept}"


def _kernels(manifest: Manifest, kernels: KernelSet) -> str:
    size = sum(manifest.files[name].bytes for name in kernels.files)
    return f"{len(kernels.names)} kernels in {kernels.dtype}, {size / 1e6:.1f} MB, compiled by Triton {kernels.triton}"


def _quality(quantization: Quantization) -> str:
    quality, worst = quantization.quality, max(quantization.layers, key=quantization.layers.__getitem__)
    frames = "" if quality.frame_psnr is None else f", frames {quality.frame_psnr:.1f} dB"
    return (
        f"{quantization.method}, {len(quantization.layers)} layers; off by {quality.flow_error:.2%} a pass, "
        f"latents {quality.latent_error:.2%}{frames}; most by {worst}, {quantization.layers[worst]:.2%}"
    )


def _rarities(stream: StreamConfig) -> dict[str, str]:
    """Settings that few models have: rows for those that this one does."""
    rows = {}
    if stream.first_chunk is not None:
        rows["first chunk"] = f"{stream.first_chunk} of {stream.chunk} latent frames"
    if stream.first_steps is not None:
        rows["first steps"] = _listed(stream.first_steps)
    if stream.positions == "window":
        rows["positions"] = "relative to the window"
    if stream.ring_dtype != "model":
        rows["ring"] = stream.ring_dtype
    if stream.refresh != "rolling":
        picture = ", its first one as a picture" if stream.refresh == "reencode" else ""
        rows["refresh"] = f"all frames in view anew before every chunk{picture}"
    if stream.context_noise:
        rows["context noise"] = f"{stream.context_noise:g}"
    return rows


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
