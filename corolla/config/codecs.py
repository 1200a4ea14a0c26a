"""Rules of codecs and strategies: few bits, few values, few ranks, and squared gradients."""

from corolla.config.asked import Asked, able, takes_sparse
from corolla.config.sections.rule import Rule
from corolla.strategies.listing import registry
from corolla.wire.compression import PLAIN

CODECS: tuple[Rule[Asked], ...] = (
    Rule(
        when=lambda asked: asked.pipelines != (PLAIN, PLAIN) and asked.traits.updates == "scalars",
        why=lambda asked: f"{asked.subject} sends scalars",
        instead="there is nothing to compress, leave codec and codec-down out",
    ),
    Rule(
        when=lambda asked: asked.up.needs_differences and asked.traits.updates != "differences",
        why=lambda asked: f"{asked.subject} sends {asked.traits.updates}",
        instead="codec top_k is for differences, where 0 means no change",
    ),
    Rule(
        when=lambda asked: asked.up.needs_differences and asked.traits.rebases,
        why=lambda asked: f"{asked.subject} has new coordinates in each round",
        instead="what codec top_k leaves out cannot be added to a later update; use int8 or int4",
    ),
    Rule(
        when=lambda asked: (
            asked.up.lossy and not asked.up.needs_differences and asked.traits.mirrors
        ),
        why=lambda asked: (
            f"{asked.subject} sums up what its clients keep, so nothing may be lost on the way"
        ),
        instead="add top_k to codec, which sends the rest later, or use zstd alone",
    ),
    Rule(
        when=lambda asked: asked.up.needs_factors and asked.traits.updates != "factors",
        why=lambda asked: f"{asked.subject} sends {asked.traits.updates}",
        instead=lambda asked: (
            f"codec rank keeps the products of factors, use "
            f"{able(lambda cls: registry.traits(cls).updates == 'factors')}"
        ),
    ),
    Rule(
        when=lambda asked: asked.down.needs_factors or asked.down.number == "int4",
        why=lambda asked: f"codec-down {', '.join(asked.config.codec_down)}",
        instead="a broadcast holds weights, not their changes; use top_k of factors, fp16, bf16 or "
        "int8, and zstd",
    ),
    Rule(
        when=lambda asked: asked.down.needs_differences and not asked.config.kind.factors,
        why=lambda asked: (
            f"codec-down {', '.join(asked.config.codec_down)} leaves values out as 0, which is "
            f"neutral in LoRA factors, found parameters={asked.config.parameters}"
        ),
        instead="use fp16, bf16 or int8",
    ),
    Rule(
        when=lambda asked: asked.down.needs_differences and asked.config.dora,
        why=lambda asked: (
            f"codec-down {', '.join(asked.config.codec_down)} leaves values out as 0, and a "
            f"magnitude of dora that is 0 silences a row"
        ),
        instead="use fp16, bf16 or int8",
    ),
    Rule(
        when=lambda asked: asked.down.needs_differences and not takes_sparse(asked.strategy),
        why=lambda asked: (
            f"codec-down top_k lets clients start from a part of the factors, and {asked.subject} "
            f"does not aggregate their changes of it"
        ),
        instead=lambda asked: f"use {able(lambda cls: takes_sparse(cls()))}",
    ),
    Rule(
        when=lambda asked: (
            asked.down.needs_differences and asked.config.start not in ("random", "gradient")
        ),
        why=lambda asked: (
            f"codec-down top_k leaves out a part of the factors, and those of "
            f"start={asked.config.start} belong together"
        ),
        instead="use start=random, or fp16, bf16 or int8",
    ),
)

SQUARES: tuple[Rule[Asked], ...] = (
    Rule(
        when=lambda asked: asked.traits.squares and len(asked.batch_sizes) > 1,
        why=lambda asked: (
            f"{asked.subject} compares squared gradients of batches, which are smaller in larger "
            f"batches, found batch_size {' and '.join(map(str, sorted(asked.batch_sizes)))}"
        ),
        instead="leave classes.NAME.batch_size out; micro_batch_size saves as much memory",
    ),
    Rule(
        when=lambda asked: (
            asked.traits.squares
            and (asked.up.needs_differences or asked.up.number not in (None, "bf16"))
        ),
        why=lambda asked: (
            f"{asked.subject} sends squared gradients, which span many orders of magnitude: codec "
            f"{', '.join(asked.config.codec)} would make most of them 0"
        ),
        instead="use bf16, and zstd",
    ),
    Rule(
        when=lambda asked: asked.traits.squares and asked.config.max_norm is not None,
        why=lambda asked: (
            f"{asked.subject} divides what clients send, so that max-norm would not bound how far "
            f"one of them moves the model"
        ),
        instead="leave max-norm out",
    ),
    Rule(
        when=lambda asked: asked.traits.squares and asked.config.robust != "none",
        why=lambda asked: (
            f"robust={asked.config.robust} does not fit {asked.subject}: it compares changes, "
            f"which are sent times squared gradients"
        ),
        instead="use fedavg, or leave robust out",
    ),
)
