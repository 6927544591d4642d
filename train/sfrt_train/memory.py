"""What memory a fine-tuning takes, counted before it is begun.

Weights, gradients and optimizer states are exact: the networks are built without memory and their parameters counted.
Activations are an estimate: what autograd keeps of a block was counted once, tensor by tensor (tests hold it to that),
on a CPU; what fused kernels, allocators and the autoencoder of longer rollouts want besides is not in it.

Shapes: D is a model's width, F that of its feed-forward layer, L tokens in a latent frame.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sfrt.backends import Grid
from sfrt.config import ModelConfig
from sfrt.device import DTYPES
from sfrt.ring import chunk_sizes, ring_for
from sfrt_train.finetune import FinetuneSettings, Finetuning
from sfrt_train.forcing import ClipPass
from sfrt_train.judging import Discriminator
from sfrt_train.loop import Descent
from sfrt_train.model import PromptedTransformer
from sfrt_train.published import empty_network, in_precision
from sfrt_train.self_forcing import descents

_FLOAT32 = 4


@dataclass(frozen=True)
class Pass:
    """A pass with a gradient over some tokens of a model, so many of them at once.

    half is the bytes of a value that its products make.
    """

    model: ModelConfig
    tokens: int
    at_once: int
    half: int

    def block(self, tokens: int) -> int:
        """Bytes that autograd keeps of one: 11 rows of D in float32 and 12 as the products make them, 2 of F."""
        model = self.model
        return tokens * (model.dim * (11 * _FLOAT32 + 12 * self.half) + model.ffn_dim * 2 * self.half)

    def activations(self, *, checkpointing: bool) -> int:
        """Of all blocks; or what goes into each, the stream and its newest branch, and one block made again."""
        if not checkpointing:
            return self.model.num_layers * self.block(self.tokens)
        entered = self.model.num_layers * self.tokens * self.model.dim * (_FLOAT32 + self.half)
        return entered + self.block(self.at_once)


def memory(
    settings: FinetuneSettings, model: ModelConfig, judge: ModelConfig, critic: ModelConfig | None = None
) -> dict[str, int]:
    """Bytes by what they are for; "peak" is the most that is there at once. critic None is as the judge.

    Not everything is there at once: an update of the critic follows a rollout that left nothing behind, one of the
    generator holds what its own rollout left for the gradient, and optimizers run when activations are gone.
    """
    run, critic = Finetuning(settings, model), critic or judge
    generator, teacher, fake = (empty_network(config, checkpointing=False) for config in (model, judge, critic))
    trained = _with_heads(fake, run)
    of_generator, of_critic = descents(run.self_forcing)
    always = {
        **_trainee("generator", generator, of_generator),
        **_trainee("critic", trained, of_critic),
        "judge: weights": _bytes(in_precision(teacher, run.self_forcing.precision)),
    }
    passing = {
        "weights in 16 bits": _halves(generator) + _halves(trained) if _half(run) < _FLOAT32 else 0,
        "text's keys and values": _token(run) * model.text_len * (2 + 2 * run.chunks),
    }
    ring, most_seen, seen = _rollout(run)
    of_critic_update, of_update = _activations(run, judge, critic)
    work = max(_bytes(generator), _bytes(trained))
    a_pass = max(ring + most_seen, of_critic_update, of_update + ring + seen)
    return {
        **always,
        **{f"a pass: {name}": count for name, count in passing.items()},
        "a rollout: ring": ring,
        "a rollout: what one chunk sees of it": most_seen,
        "a rollout with gradient: what all its chunks saw": seen,
        "the critic's update: activations": of_critic_update,
        "the generator's update: activations": of_update,
        "an optimizer's step": work,
        "peak": sum(always.values()) + max(work, sum(passing.values()) + a_pass),
    }


def table(said: dict[str, int]) -> str:
    """In GiB, as Markdown."""
    rows = [f"| {name} | {count / 2**30:.2f} |" for name, count in said.items()]
    return "\n".join(["| what | GiB |", "| --- | --- |", *rows])


def _with_heads(critic: PromptedTransformer, run: Finetuning) -> nn.Module:
    """What is trained beside the generator: a GAN's critic has heads."""
    if run.self_forcing.loss != "gan":
        return critic
    return Discriminator(critic, ClipPass.of("none", run, run.chunks, "meta"))


def _trainee(name: str, module: nn.Module, descent: Descent) -> dict[str, int]:
    """What sfrt_train.loop.Trainee keeps: AdamW has two moments of each weight, and a count for each parameter."""
    size, count = _bytes(module), len(list(module.parameters()))
    kept = {"weights": size, "gradients": size, "AdamW": 2 * size + _FLOAT32 * count}
    if descent.ema:
        kept["averaged weights"] = size
    return {f"{name}: {what}": number for what, number in kept.items()}


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _halves(module: nn.Module) -> int:
    """What autocast makes of the weights of its products, and keeps while it is on."""
    products = [part for part in module.modules() if isinstance(part, nn.Linear)]
    return 2 * sum(parameter.numel() for part in products for parameter in part.parameters())


def _half(run: Finetuning) -> int:
    return DTYPES[run.self_forcing.precision].itemsize


def _token(run: Finetuning) -> int:
    """Keys and values of a token in all layers, for the batch."""
    return run.self_forcing.batch * 2 * run.transformer.num_layers * run.transformer.dim * _half(run)


def _rollout(run: Finetuning) -> tuple[int, int, int]:
    """(the ring, what one chunk sees of it at most, what all the chunks with a gradient saw)"""
    stream, own = run.stream, run.self_forcing
    longest = own.longest if own.long_share else run.chunks
    ring = ring_for(stream, chunk_sizes(stream).start(longest))
    frame = _token(run) * Grid.of(run.transformer, stream).tokens
    seen = [len(ring.context(start, stream.chunk)) for start in range(0, longest * stream.chunk, stream.chunk)]
    return frame * ring.slots, frame * max(seen), frame * sum(seen[-run.chunks :])


def _activations(run: Finetuning, judge: ModelConfig, critic: ModelConfig) -> tuple[int, int]:
    """(of the critic's update, of the generator's), whose gradient goes through scores too where the loss is no DMD."""
    own, again = run.self_forcing, run.settings.checkpointing
    chunk = own.batch * run.stream.chunk * Grid.of(run.transformer, run.stream).tokens
    whole = chunk * run.chunks
    rolled = Pass(run.transformer, whole, chunk, _half(run)).activations(checkpointing=again)
    of_critic, of_judge = (
        Pass(model, whole, whole, _half(run)).activations(checkpointing=again) for model in (critic, judge)
    )
    if own.loss == "gan":  # real and generated videos, each with and without a little noise
        return 4 * of_critic, rolled + of_critic
    through = of_critic + of_judge * (2 if own.guidance else 1) if own.loss == "sid" else 0
    return of_critic, rolled + through
