"""``edgejax finetune --dry-run``: everything a run compiles, compiled and kept, and what the run will take.

No weight is read, and nothing is written but the compile cache. A run with the same arguments then finds its programs
there and never has the memory that compiling takes. ``--model shape:NAME`` is of a model whose files are not here.
"""

import argparse
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from edgejax.core.errors import ConfigError

if TYPE_CHECKING:
    from edgejax.data import Tokenizer
    from edgejax.models import LoraConfig, ModelConfig
    from edgejax.train import TrainSettings


SHAPE = "shape:"
OF_THE_CPU = "--dry-run and --memory count the memory of a process that computes on the CPU"


class Subject(NamedTuple):
    """What a dry run is of.

    Attributes:
      config: the decoder's.
      params: shapes and dtypes of its parameters; None where ``source`` is a packed file.
      tokenizer: None: of a model that is not on this machine.
      source: the layers of a streamed run; None: not streamed.
    """

    config: "ModelConfig"
    params: Any
    tokenizer: "Tokenizer | None"
    source: Any


def dry_run(options: argparse.Namespace, lora: "LoraConfig | None", *, keeps_programs: bool) -> int:
    """Compiles a run's programs and prints its footprint; returns 0.

    Args:
      options: of the command.
      lora: the adapters; None: all parameters train.
      keeps_programs: whether there is a compile cache.

    Raises:
      ConfigError, DataError, WeightsError: as the run would, but that a streamed run needs a packed file.
    """
    import jax

    from edgejax.cli.finetune import check_sample, load_rows, train_settings
    from edgejax.core.cache import forget_traces
    from edgejax.measure.memory import process_memory
    from edgejax.plan.process import bytes_once_opened, process_footprint
    from edgejax.train.programs import compile_programs

    for name in ("mesh", "resume"):
        if getattr(options, name):
            raise ConfigError(f"--dry-run is of a new run on one device; leave out --{name}")
    if jax.default_backend() != "cpu":
        raise ConfigError(
            f"{OF_THE_CPU}, and this one does on {jax.devices()[0].device_kind}: JAX_PLATFORMS=cpu chooses the CPU, and "
            "`edgejax plan --device this` is of the other's memory, where it says how much it has"
        )
    subject = _open(options)
    rows = None
    if subject.tokenizer is not None:
        check_sample(options, subject.tokenizer, subject.config)
        rows = load_rows(options, subject.tokenizer, subject.config).train
    elif options.epochs is not None:
        raise ConfigError("--epochs counts rows, and rows need the model's tokenizer; give --steps")
    opened = bytes_once_opened(process_memory())  # before anything is compiled
    settings = train_settings(options, rows)
    params = subject.source or subject.params
    programs = compile_programs(subject.config, params, settings, lora, options.seq)
    forget_traces()
    sample_temp = _compile_rest(options, subject, programs, settings, lora)
    footprint = process_footprint(
        programs, subject.config, settings, lora, options.seq,
        opened_bytes=opened, compiling_bytes=process_memory().peak_rss_bytes, source=subject.source,
        sample_temp_bytes=sample_temp,
    )  # fmt: skip
    if options.json:
        print(json.dumps({"footprint": footprint.to_json(), "keeps_programs": keeps_programs}))
    elif not options.quiet:
        print(as_text(options, footprint, keeps_programs))
    return 0


def as_text(options: argparse.Namespace, footprint: Any, keeps_programs: bool) -> str:
    """What a person reads."""
    from edgejax.core.units import format_bytes

    kept = "a run with the same arguments finds them" if keeps_programs else "they could not be kept"
    if footprint.remark:
        kept = footprint.remark
    lines = [
        f"{options.model} would take {format_bytes(footprint.running_bytes)} at its most, of which",
        *(f"  {name:<22}{format_bytes(size):>10}" for name, size in footprint.sources.items()),
        f"compiling its programs took {format_bytes(footprint.compiling_bytes)}; {kept}",
    ]
    return "\n".join(lines)


def _open(options: argparse.Namespace) -> Subject:
    from edgejax.cli.session import need_tokenizer
    from edgejax.models.shapes import find_shape
    from edgejax.plan.process import LayerShapes
    from edgejax.weights import open_model
    from edgejax.weights.leaves import check_base
    from edgejax.weights.load import abstract_params
    from edgejax.weights.random import RandomSource

    streamed = options.schedule == "streamed"
    if options.model.startswith(SHAPE):
        config = find_shape(options.model.removeprefix(SHAPE).removesuffix("-bf16"))
        params = abstract_params(RandomSource(config, 0), check_base(options.base))
        return Subject(config, params, None, LayerShapes(params) if streamed else None)
    opened = open_model(options.model, base=options.base)
    tokenizer = need_tokenizer(opened)
    if streamed and hasattr(opened.reader, "layer"):  # a packed file
        return Subject(opened.config, None, tokenizer, opened.reader)
    params = opened.abstract_params()
    return Subject(opened.config, params, tokenizer, LayerShapes(params) if streamed else None)


def _compile_rest(
    options: argparse.Namespace,
    subject: Subject,
    programs: Any,
    settings: "TrainSettings",
    lora: "LoraConfig | None",
) -> int | None:
    """The small programs: the state's beginning and check, the log's learning rates, the sample.

    Returns:
      Bytes that the sample's programs take; None: there is no sample.
    """
    import jax

    from edgejax.measure.memory import xla_memory
    from edgejax.models import Decoder, init_lora
    from edgejax.models.generate import compile_generation
    from edgejax.train.checkpoint import compile_checks
    from edgejax.train.learning_rate import rates
    from edgejax.train.recipe import abstract_run, compile_start

    compile_start(programs.recipe, subject.config, programs.params, lora)
    compile_checks(abstract_run(programs.recipe, subject.config, programs.params, lora)[1])
    rates(programs.schedule, settings.steps)
    if not options.sample_tokens:
        return None
    params, adapters = jax.tree.map(_as_pattern, subject.params), {}
    if lora is not None:
        params = subject.params
        adapters = jax.eval_shape(lambda key: init_lora(subject.config, lora, key), jax.random.key(0))
    n_prompt = 1 if subject.tokenizer is None else len(subject.tokenizer.encode(options.prompt))
    sample = compile_generation(
        Decoder(subject.config, lora), params, adapters, n_prompt, options.sample_tokens
    )
    return max(xla_memory(program).temp_bytes for program in sample)


def _as_pattern(leaf: Any) -> Any:
    """As ``train.held.as_patterns`` does, of a leaf's shape and dtype."""
    import jax
    import jax.numpy as jnp

    from edgejax.quant import Bfloat16Array

    if leaf.dtype != jnp.bfloat16:
        return leaf
    pattern: Any = jax.ShapeDtypeStruct(leaf.shape, jnp.uint16)
    return Bfloat16Array(pattern)
