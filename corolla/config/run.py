"""The settings of a run: one flat list of keys, the same in a TOML file, in --set and in code."""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from corolla.aggregation import robust
from corolla.aggregation.robust import Rule, Space
from corolla.config import rules
from corolla.errors import ConfigError
from corolla.strategies import files, registry
from corolla.types import LoraSpec, Strategy, TrainerName
from corolla.wire import compression
from corolla.wire.compression import Pipeline

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]

SERVER = "server"
"""The table of a config file that is of the machine `corolla server` runs on, not of the run."""

LR_FIRST_ORDER = {"ia3": 3e-3, "prompt": 3e-3, "full": 3e-5}
"""What is trained → the default lr of first-order strategies where it is not 3e-4, that of LoRA.

The embedded model takes ten times as much, and all its parameters as much as an adapter.
"""

LR_ZEROTH_ORDER = {
    ("lora", True): 3e-3,
    ("lora", False): 1e-4,
    ("full", True): 3e-4,
    ("full", False): 1e-6,
}
"""(what is trained, whether on the embedded model) → the default lr of zeroth-order strategies."""


def _lr_zeroth_order(parameters: object, embedded: bool) -> float:
    """Of LR_ZEROTH_ORDER: what is neither all parameters nor LoRA is as small as LoRA."""
    return LR_ZEROTH_ORDER["full" if parameters == "full" else "lora", embedded]


class ClientClass(BaseModel):
    """Clients that differ from the rest: what is not given here is as in the run."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    share: Positive = Field(1, description="of clients, in turn, among all classes")
    trainer: TrainerName | None = None
    lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="zeroth order beside first: see LR_ZEROTH_ORDER; else that of the run"
    )
    local_steps: Positive | None = None
    batch_size: Positive | None = None
    queries: Positive | None = None
    eps: Annotated[float, Field(ge=1e-20)] | None = None
    rank: Positive | None = Field(None, description="of its adapters; needs mixed ranks")
    alpha: Annotated[float, Field(gt=0)] | None = None

    speed: Annotated[float, Field(gt=0)] | None = Field(
        None, description="simulated: how many times as fast as the others it trains"
    )
    upload: Annotated[float, Field(gt=0)] | None = Field(
        None, description="simulated: bytes per second; None: no time"
    )
    download: Annotated[float, Field(gt=0)] | None = Field(
        None, description="simulated: bytes per second; None: no time"
    )
    drop: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="simulated: probability that a client does not answer in a round"
    )


class RunConfig(BaseModel):
    """Everything that decides the result of a run, checked before anything is loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    strategy: str = Field(
        "fedavg", description="name; module:Class or FILE.py:Class for one of your own"
    )
    options: dict[str, Any] = Field({}, description="hyper-parameters of the strategy")
    model: str = Field("embedded", description="'embedded', hub name, folder or .gguf file")
    data: str = Field("embedded", description="'embedded', .jsonl file or hub name")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    engine: Literal["inprocess", "flower"] = "inprocess"

    clients: Positive | None = Field(None, description="how many; None: all of the data set")
    cohort: Positive | None = Field(None, description="clients per round; None: 8 or all")
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 5
    quorum: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="a round needs valid replies from this part of its cohort"
    )

    deadline: Annotated[float, Field(gt=0)] = Field(
        3600.0, description="seconds for a round on Flower; late replies are dropped"
    )
    attempts: Positive = Field(
        3, description="at a round that is abandoned, each with another cohort, before the run ends"
    )
    wait: Annotated[float, Field(ge=0)] = Field(
        3600.0, description="seconds to pause while too few clients are online, then the run stops"
    )
    max_norm: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of one update (joint L2 norm); what is larger is refused"
    )

    max_examples: Positive | None = Field(
        None, description="of one client of corolla server; who says it has more is left out"
    )

    max_seconds: Annotated[float, Field(gt=0)] | None = Field(
        None, description="end after so long, resumptions included"
    )
    target_loss: Annotated[float, Field(gt=0)] | None = Field(
        None, description="end when the held-out loss is at most this"
    )
    patience: Positive | None = Field(
        None, description="end after so many evaluations without a lower held-out loss"
    )

    selection: Literal["uniform", "weighted"] = Field(
        "uniform",
        description="of a cohort; weighted: by numbers of training examples, which then count "
        "twice, in the draw and in the mean",
    )
    availability: str | None = Field(
        None, description='.jsonl of {"client_id", "from", "to"}: rounds, both ends included'
    )
    step_seconds: Annotated[float, Field(gt=0)] | None = Field(
        None, description="simulated: of a local step at speed 1; None: 1 where time is simulated"
    )
    deadline_simulated: Annotated[float, Field(gt=0)] | None = Field(
        None, description="simulated seconds for a round; late replies are dropped"
    )
    buffer: Positive | None = Field(
        None, description="asynchronous: updates a round takes of the cohort always at work"
    )
    staleness_power: Annotated[float, Field(ge=0)] = Field(
        0.5, description="with buffer: weights are examples / (1 + rounds behind)^this"
    )

    task: Literal["auto", "causal", "classify"] = "auto"
    partition: Literal[
        "auto", "natural", "iid", "dirichlet", "shards", "linear", "square", "exponential"
    ] = Field("auto", description="auto: natural where the data has client_id, else iid")
    partition_alpha: Annotated[float, Field(gt=0)] = Field(0.5, description="of dirichlet")
    shards_per_client: Positive = 2
    eval_fraction: Fraction = Field(0.1, description="of each client, and again held out globally")
    min_examples: Positive = Field(
        2, description="clients with fewer training examples are left out"
    )
    max_length: Annotated[int, Field(ge=8)] = Field(256, description="tokens")

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    rslora: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | None = Field(
        None, description="None: all linear layers of the blocks"
    )
    ranks: list[Positive] = Field(
        [], description="per client, in turn; needs a mixed-rank strategy"
    )
    alphas: list[Annotated[float, Field(gt=0)]] = Field([], description="per client, beside ranks")

    start: Literal["random", "gradient"] = Field(
        "random", description="of the adapter; gradient: a first step on public rows, by an SVD"
    )
    public: str | None = Field(
        None, description="for start=gradient: .jsonl file with rows that belong to no client"
    )
    public_examples: Positive = Field(64, description="of these rows, at most")

    parameters: Literal["lora", "ia3", "prompt", "bias", "head", "full"] = Field(
        "lora", description="what is trained: an adapter, or tensors as they are (see dense.py)"
    )
    virtual_tokens: Positive = Field(20, description="of parameters=prompt")
    classes: dict[str, ClientClass] = Field(
        {}, description="classes of clients by name; clients take them in turn, by their shares"
    )

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = Field(
        3e-4,
        description="3e-3 for the embedded model; see LR_FIRST_ORDER and LR_ZEROTH_ORDER",
    )
    queries: Positive = Field(1, description="directions a zeroth-order step measures")
    estimator: Literal["two_sided", "kerzoo"] = Field(
        "two_sided", description="how a zeroth-order step estimates a slope"
    )
    eps: Annotated[float, Field(ge=1e-20)] = Field(
        1e-3, description="how far along a direction a zeroth-order step looks, both ways"
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    local_steps: Positive = Field(10, description="50 where all clients are zeroth order")
    local_epochs: Positive | None = Field(None, description="instead of local_steps")
    batch_size: Positive = 8
    micro_batch_size: Positive | None = Field(None, description="None: batch_size")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="across rounds")
    warmup_rounds: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="L2 norm of a step's gradient; None with dp=example, which has its own"
    )

    codec: list[str] = Field(
        [], description="of updates, in this order: rank:R, top_k:DENSITY, a number type, zstd"
    )
    codec_down: list[str] = Field(
        [], description="of broadcasts: fp16, bf16 or int8, zstd; groups that are cached stay whole"
    )

    robust: Literal["none", Rule] = Field(
        "none", description="how updates are defended against hostile clients (see robust.py)"
    )
    byzantine: Positive | None = Field(
        None, description="how many of a cohort may be hostile; None: a fifth, at least 1"
    )
    robust_space: Literal["auto", Space] = Field(
        "auto", description="where updates are compared; auto: products where these are added up"
    )

    dp: Literal["none", "example", "client"] = Field(
        "none", description="differential privacy of each example, or of each client as a whole"
    )
    epsilon: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of the whole run; the noise is made for it, and the run ends before it"
    )
    delta: Annotated[float, Field(gt=0, lt=0.1)] = Field(
        1e-5, description="of (epsilon, delta); less than 1 in the examples, or clients, there are"
    )
    clip: Annotated[float, Field(gt=0)] = Field(
        1.0, description="L2 norm that one example's gradient, or one client's update, can have"
    )
    noise_multiplier: Annotated[float, Field(ge=1e-3)] | None = Field(
        None, description="instead of epsilon: std of the noise on a sum, over clip"
    )
    clip_quantile: Fraction | None = Field(
        None, description="dp=client: clip follows this quantile of the norms, from `clip` on"
    )
    dp_sampling: Literal["fixed", "poisson"] = Field(
        "fixed", description="dp=client: of a cohort; poisson: by secret chance, which amplifies"
    )
    dp_mechanism: Literal["gaussian", "banded"] = Field(
        "gaussian", description="dp=client; banded: noise of a round is partly taken back later"
    )
    participations: Positive | None = Field(
        None, description="rounds one client may train in, which bounds the noise; None: all"
    )
    separation: Positive = Field(
        1, description="dp=client: a client may train again so many rounds later"
    )

    eval_every: Positive = 1
    eval_examples: Positive = Field(256, description="held-out examples per evaluation, at most")
    eval_client_examples: Positive = Field(32, description="of each client that is evaluated")
    eval_participants: bool = Field(
        False,
        description="only clients that train are evaluated; always so for personal strategies",
    )
    eval_clients: Annotated[int, Field(ge=0)] = Field(32, description="clients evaluated, at most")
    answer: Literal["none", "exact", "gsm8k"] = Field(
        "none", description="what of generated answers is compared, before and after the run"
    )
    max_new_tokens: Positive = Field(256, description="of a generated answer")

    device: str = Field("auto", description="cpu, cuda, mps; auto: the best there is")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the base")
    quantization: Literal["none", "8bit", "4bit"] = "none"
    gradient_checkpointing: bool = False
    threads: Annotated[int, Field(ge=0)] = Field(0, description="of the CPU; 0: all cores")

    @model_validator(mode="before")
    @classmethod
    def _defaults_that_fit(cls, values: Any) -> Any:
        """The embedded model is a hundred times smaller than others: it wants a higher rate.

        A zeroth-order step is as noisy as there are parameters: it wants a far lower one.
        """
        if not isinstance(values, dict):
            return values
        if values.get("dp") == "example":  # what is noised is clipped already
            values = {"clip_norm": None, **values}
        try:
            known = registry.find(str(values.get("strategy", "fedavg")))
        except ConfigError:  # said when the strategy is built
            known = None
        embedded = values.get("model", "embedded") == "embedded"
        if known and known.trainers[0] == "zeroth_order":
            lr = _lr_zeroth_order(values.get("parameters"), embedded)
            return {"lr": lr, "local_steps": 50, **values}
        role = str(values.get("parameters", "lora"))
        if embedded:
            role = "lora" if role == "full" else role  # a million parameters are no more than that
        rate = LR_FIRST_ORDER.get(role, 3e-4)
        return {"lr": float(f"{10 * rate:g}") if embedded else rate, **values}

    @field_validator("strategy")
    @classmethod
    def _absolute_file(cls, name: str) -> str:
        """As paths of model and data: FILE.py:Class must mean the same from another folder."""
        return files.absolute(name)

    @field_validator("model", "data", "availability", "public")
    @classmethod
    def _absolute(cls, name: str | None) -> str | None:
        """A path must mean the same from another folder: run.json is read later."""
        if name is None or name == "embedded" or not Path(name).exists():
            return name
        return str(Path(name).resolve())

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if self.clients and self.cohort and self.cohort > self.clients:
            raise ValueError(f"cohort {self.cohort} is larger than clients {self.clients}")
        if self.alphas and len(self.alphas) != len(self.ranks):
            raise ValueError(f"alphas has {len(self.alphas)} entries, ranks {len(self.ranks)}")
        if (self.micro_batch_size or 1) > self.batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} is larger than "
                f"batch_size {self.batch_size}"
            )
        by_class = [n for n, own in self.classes.items() if own.rank or own.alpha]
        if self.ranks and by_class:
            raise ValueError(
                f"ranks go by client and by class (classes.{by_class[0]}): give one of them"
            )
        if self.buffer and self.cohort and self.buffer > self.cohort:
            raise ValueError(f"buffer {self.buffer} is larger than cohort {self.cohort}")
        if self.buffer and self.deadline_simulated:
            raise ValueError("with buffer no reply is late: leave deadline-simulated out")
        if self.quantization != "none" and self.parameters not in ("lora", "prompt"):
            raise ValueError(
                f"parameters={self.parameters} cannot train a base in {self.quantization}"
            )
        if (self.ranks or by_class) and self.parameters != "lora":
            raise ValueError(f"ranks are those of adapters: parameters={self.parameters} has none")
        if self.target_modules and self.parameters not in ("lora", "ia3"):
            raise ValueError(
                f"target-modules are those of adapters: parameters={self.parameters} has none"
            )
        if self.quantization != "none" and self.engine == "inprocess" and self.device == "mps":
            raise ValueError("4- and 8-bit base models need a CPU or CUDA device")
        rules.refuse_public(self)
        rules.refuse_privacy(self)
        return self

    def build_strategy(self) -> Strategy:
        """The strategy with its options. Raises ConfigError; also for what it does not go with."""
        strategy = registry.create(self.strategy, self.options)
        rules.refuse(self, strategy)
        return strategy

    @property
    def uplink(self) -> Pipeline:
        """How updates are compressed. Raises ConfigError."""
        return compression.pipeline(self.codec)

    @property
    def downlink(self) -> Pipeline:
        """How broadcasts are compressed. Raises ConfigError."""
        return compression.pipeline(self.codec_down)

    def compared_in(self, strategy: Strategy) -> Space:
        """The space of the rule that `robust` names."""
        own = robust.space_of(registry.traits(strategy))
        return own if self.robust_space == "auto" else self.robust_space

    def class_of(self, index: int) -> str:
        """The class of the index-th client, in the order of client ids; "" without classes."""
        turns = [name for name, own in self.classes.items() for _ in range(own.share)]
        return turns[index % len(turns)] if turns else ""

    def of_class(self, name: str) -> "RunConfig":
        """The settings of the clients of a class. Raises ConfigError for an unknown one."""
        if not name:
            return self
        if name not in self.classes:
            raise ConfigError(f"unknown class {name!r}: known are {', '.join(self.classes)}")
        given = self.classes[name].model_dump(
            include=set(RunConfig.model_fields), exclude_none=True
        )
        usual = registry.find(self.strategy).trainers[0]
        if self.trainer_of(name) == "zeroth_order" != usual and "lr" not in given:
            given["lr"] = _lr_zeroth_order(self.parameters, self.model == "embedded")
        changed = self.model_copy(update=given)
        micro = changed.micro_batch_size
        return changed.model_copy(
            update={"micro_batch_size": micro and min(micro, changed.batch_size)}
        )

    def trainer_of(self, name: str) -> TrainerName:
        """How the clients of a class train."""
        wanted = self.classes[name].trainer if name else None
        return wanted or registry.find(self.strategy).trainers[0]

    @property
    def simulates_time(self) -> bool:
        """Whether metrics tell how long rounds would take on the devices that classes describe."""
        given = (own.speed or own.upload or own.download for own in self.classes.values())
        return bool(self.step_seconds or self.deadline_simulated or self.buffer or any(given))

    @property
    def lora(self) -> LoraSpec:
        """Rank and scaling of the global adapter: those of the client with the largest rank."""
        return max(self.loras, key=lambda spec: spec.rank)

    @property
    def loras(self) -> list[LoraSpec]:
        """Ranks and scalings that clients have: those of `ranks`, in turn, or of each class."""
        if self.ranks:
            alphas = self.alphas or [self.alpha] * len(self.ranks)
            pairs = list(zip(self.ranks, alphas, strict=True))
        else:
            classes = self.classes.values() or [ClientClass()]
            pairs = [(own.rank or self.rank, own.alpha or self.alpha) for own in classes]
        return [LoraSpec(rank, alpha, self.rslora) for rank, alpha in pairs]

    def client_lora(self, index: int) -> LoraSpec:
        """Rank and scaling of the index-th client, in the order of client ids."""
        if self.ranks or not self.classes:
            return self.loras[index % len(self.loras)]
        return self.loras[list(self.classes).index(self.class_of(index))]


def load(
    file: Path | None, overrides: Mapping[str, object], settings: Sequence[str] = ()
) -> RunConfig:
    """Defaults, then the TOML file, then --set key=value, then the command's own options.

    A key may be written with - or _. `[NAME]` tables and `NAME.field=value` set options of the
    strategy NAME; `strategy.field=value` those of the chosen one. Raises ConfigError with the
    nearest known name for an unknown key.
    """
    return validate(_gather(file, overrides, settings))


def resumed(
    folder: Path, file: Path | None, overrides: Mapping[str, object], settings: Sequence[str] = ()
) -> RunConfig:
    """The config of the run in `folder`. Raises ConfigError when an option contradicts it."""
    path = folder / "run.json"
    if not path.is_file():
        raise ConfigError(f"nothing to resume in {folder}: it has no run.json")
    try:
        stored = validate(json.loads(path.read_text())["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {error!r}") from error
    return unchanged(stored, overrides, settings, file)


def unchanged(
    stored: RunConfig,
    overrides: Mapping[str, object],
    settings: Sequence[str] = (),
    file: Path | None = None,
) -> RunConfig:
    """A stored config. Raises ConfigError when what is given contradicts it."""
    asked = amended(stored, overrides, settings, file)
    for key in RunConfig.model_fields:
        if getattr(asked, key) != getattr(stored, key):
            raise ConfigError(
                f"--resume goes on with {key.replace('_', '-')}={getattr(stored, key)!r}, "
                f"found {getattr(asked, key)!r}: leave it out"
            )
    return stored


def amended(
    stored: RunConfig,
    overrides: Mapping[str, object],
    settings: Sequence[str] = (),
    file: Path | None = None,
) -> RunConfig:
    """A stored config with what is given put over it. Raises ConfigError as `load` does."""
    given = _gather(file, overrides, settings, stored.strategy)
    return validate({**stored.model_dump(), **given})


def server_table(file: Path) -> dict[str, Any]:
    """The [server] table of a config file: what `corolla server` reads beside the run's keys."""
    table = _read(file).get(SERVER, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{SERVER} in {file} is no table: write [{SERVER}]")
    return {_key(key): value for key, value in table.items()}


def _gather(
    file: Path | None,
    overrides: Mapping[str, object],
    settings: Sequence[str],
    default_strategy: str = "fedavg",
) -> dict[str, Any]:
    """What was given, and nothing else: keys of RunConfig."""
    values: dict[str, Any] = {}
    tables: dict[str, dict[str, Any]] = {}
    for key, value in (_read(file) if file else {}).items():
        if key != SERVER:
            _assign(values, tables, _key(key), value, str(file))
    for setting in settings:
        key, found, text = setting.partition("=")
        if not found:
            raise ConfigError(f"--set {setting!r}: expected key=value")
        _assign(values, tables, _key(key.strip()), _literal(text), "--set")
    values |= {key: value for key, value in overrides.items() if value is not None}
    if "strategy" in values and ":" not in str(values["strategy"]):
        values["strategy"] = str(values["strategy"]).replace("-", "_")
    chosen = str(values.get("strategy", default_strategy))
    options = {**values.get("options", {}), **tables.get("strategy", {}), **tables.get(chosen, {})}
    return {**values, "options": options} if options else values


def validate(values: Mapping[str, Any]) -> RunConfig:
    """A RunConfig. Raises ConfigError with one line for the first thing that is wrong."""
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]).replace("_", "-")
        message = str(first["msg"]).removeprefix("Value error, ")
        found = f", found {first['input']!r}" if where else ""
        raise ConfigError(f"{where}: {message}{found}" if where else message) from error
    config.build_strategy()
    return config


def _assign(
    values: dict[str, Any], tables: dict[str, dict[str, Any]], key: str, value: Any, source: str
) -> None:
    table, dot, field = key.partition(".")
    if table == "classes" and dot:  # classes.phone.lr=1e-3
        _assign_class(values, field, value, source)
    elif isinstance(value, dict) and not dot and key != "options":
        for name, entry in value.items():
            _assign(values, tables, f"{key}.{name}", entry, source)
    elif dot:
        if table not in registry.STRATEGIES and table != "strategy":
            raise _unknown(table, ["strategy", *registry.STRATEGIES], source)
        tables.setdefault(table, {})[field.replace("-", "_")] = value
    elif key not in RunConfig.model_fields:
        raise _unknown(key, list(RunConfig.model_fields), source)
    else:
        values[key] = value


def _key(text: str) -> str:
    """A key may be written with -; the name of a class stays as it is."""
    return text if text.startswith("classes.") else text.replace("-", "_")


def _assign_class(values: dict[str, Any], field: str, value: Any, source: str) -> None:
    """`NAME.key` of the table of classes, or NAME with a table of keys."""
    name, _, entry = field.partition(".")
    given = {entry: value} if entry else value
    classes = values.setdefault("classes", {})
    if not name or not isinstance(given, dict) or not isinstance(classes, dict):
        raise ConfigError(f"classes.{field} in {source}: expected classes.NAME.KEY=value")
    for part, setting in given.items():
        known = part.replace("-", "_")
        if known not in ClientClass.model_fields:
            raise _unknown(known, list(ClientClass.model_fields), source)
        classes.setdefault(name, {})[known] = setting


def _unknown(key: str, known: list[str], source: str) -> ConfigError:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f": did you mean {near[0]!r}?" if near else f"; known keys are {', '.join(known)}"
    return ConfigError(f"unknown key {key!r} in {source}{hint}")


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config file {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {file} is not TOML: {error}") from error


def _literal(text: str) -> Any:
    """A value as TOML or JSON would read it; anything else is a string."""
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()
