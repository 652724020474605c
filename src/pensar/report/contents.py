"""What a report holds: the structs that `report.json` is written from and that the page is drawn from, nothing else."""

from typing import Annotated, Any, Literal

import msgspec

from pensar.train.prediction import Hyperparameters, Prediction


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Parent of every part of a report."""


class StageRow(Part, frozen=True, kw_only=True):
    """One stage's artifact: what it cost and what it came from."""

    name: str
    folder: str
    fingerprint: str
    revision: int
    seconds: float
    cpu_seconds: float
    ranks: int
    peak_memory_bytes: int
    tokens: int | None = None
    tokens_per_second: float | None = None
    resumed: bool = False
    finished: str = ""
    """UTC, ISO 8601."""
    inputs: dict[str, str] = {}
    """Role -> folder of the artifact that plays it."""
    outside: dict[str, str] = {}
    """Path beyond the run -> its digest."""
    config: dict[str, Any] = {}
    """Defaults omitted."""
    counts: dict[str, Any] = {}


class Draft(Part, frozen=True, kw_only=True):
    """A stage that has begun and not finished."""

    name: str
    steps: int


class FunnelRow(Part, frozen=True, kw_only=True):
    """What one data stage let through."""

    stage: str
    documents_in: int
    documents_out: int
    bytes_in: int
    bytes_out: int
    dropped: dict[str, int]
    """Reason -> documents."""


class ExamplesRow(Part, frozen=True, kw_only=True):
    """What a stage that chooses training examples let through."""

    stage: str
    queries: int | None
    examples: int
    dropped: dict[str, int]


class LanguageRow(Part, frozen=True, kw_only=True):
    code: str
    name: str
    documents: int = 0


class Languages(Part, frozen=True, kw_only=True):
    """Documents by language after the last stage that counted them."""

    stage: str
    table_size: int
    """Languages and dialects that the project means to cover."""
    present: list[LanguageRow]
    missing: list[LanguageRow]
    other: list[LanguageRow]
    """Program code, undetermined, or outside the table."""


class GroupLoss(Part, frozen=True, kw_only=True):
    """The training loss on the documents of one group, such as a domain or a language."""

    label: str
    tokens: int
    """Predicted ones, over all steps."""
    first: float
    """Mean over the tokens of the first tenth of the rows, nats per token."""
    last: float
    points: list[tuple[float, float]]
    """(step, mean up to that step since the point before)."""


class Training(Part, frozen=True, kw_only=True):
    """The record of one training stage, thinned for drawing."""

    stage: str
    steps: int
    tokens: int
    finished: bool
    first: dict[str, float]
    """Value -> mean over the first tenth of the steps."""
    last: dict[str, float]
    """Value -> mean over the last tenth of the steps."""
    series: dict[str, list[tuple[float, float]]]
    """Value -> (step, mean around that step)."""
    groups: dict[str, list[GroupLoss]] = {}
    """Mark (domain, language, source, kind) -> its groups, those of the most tokens first."""


class Target(Part, frozen=True, kw_only=True):
    """What the laws of a sweep say for a pre-training stage of the run."""

    stage: str
    values: Hyperparameters


class Scaling(Part, frozen=True, kw_only=True):
    """A sweep of small runs and what follows from it."""

    prediction: Prediction
    targets: list[Target]
    """The stages that begin a model."""
    ladder: list[Hyperparameters]
    """The laws' values at the end of the sweep, and some way beyond."""


class ExpertShares(Part, frozen=True, kw_only=True):
    """How the experts of a sparse model shared the last steps of a stage."""

    stage: str
    steps: tuple[int, int]
    """The first of them, and the one after the last."""
    shares: list[list[float]]
    """Of each layer, each expert's part of the assignments."""


class Scored(Part, frozen=True, kw_only=True):
    """A measured value with its 95% interval and the number of trials."""

    score: float
    low: float | None = None
    high: float | None = None
    n: int = 0


class StageScore(Scored, frozen=True, kw_only=True):
    """One cell of the stage table."""

    benchmark: str
    after_stage: str
    mode: str
    families: dict[str, float] = {}
    tokens: float | None = None
    """Mean length of a reply."""
    change: float | None = None
    """Against the stage before in the same mode."""


class BudgetPoint(Part, frozen=True, kw_only=True):
    budget: int
    accuracy: float
    low: float | None = None
    high: float | None = None
    n: int = 0


class WayPoint(Part, frozen=True, kw_only=True):
    """Held-out questions under one way of giving thinking budgets."""

    way: Literal["unlimited", "fixed", "learned"]
    share: float
    """Of questions that the budgets were to suffice for."""
    budget: float | None
    """Mean over the questions; None without limit."""
    right: int
    questions: Annotated[int, msgspec.Meta(ge=1)]
    reasoning_tokens: float
    """Mean over the questions."""
    sufficed: float
    """Share of questions whose thinking ended by itself."""
    accuracy: float = 0.0
    low: float = 0.0
    high: float = 1.0


class LearnedBudgets(Part, frozen=True, kw_only=True):
    """What budgets told from the question are worth beside one for all."""

    stage: str
    points: list[WayPoint]


class References(Part, frozen=True, kw_only=True):
    """Accuracy without thinking and with thinking to its own end."""

    non_thinking: float | None = None
    thinking: float | None = None


class Method(Part, frozen=True, kw_only=True):
    """One way of training the student."""

    method: str
    stage: str = ""
    pass_at_1: float
    pass_at_1_low: float | None = None
    pass_at_1_high: float | None = None
    pass_at_k: float | None = None
    pass_at_k_low: float | None = None
    pass_at_k_high: float | None = None
    k: int = 0
    samples: int | None = None
    cost_flops: float | None = None
    seconds: float | None = None
    role: str = ""
    """What the method is in the comparison: `start`, `rl` or `on-policy`; empty where its name does not tell."""
    samples_ratio: float | None = None
    """Samples, as a multiple of reinforcement learning's."""
    flops_ratio: float | None = None
    seconds_ratio: float | None = None


class LongContext(Scored, frozen=True, kw_only=True):
    after_stage: str
    benchmark: str
    length_tokens: float


class Validation(Scored, frozen=True, kw_only=True):
    """Score on the problems reserved for validation, and with many samples a problem."""

    stage: str
    pass_at_1: float | None = None
    pass_at_1_low: float | None = None
    pass_at_1_high: float | None = None
    pass_at_k: float | None = None
    pass_at_k_low: float | None = None
    pass_at_k_high: float | None = None
    k: int = 0


class Sampled(Part, frozen=True, kw_only=True):
    """A conversation held with the model."""

    title: str
    mode: str = ""
    score: float | None = None
    """The verifier's."""
    messages: list[dict[str, Any]] = []


class Results(Part, frozen=True, kw_only=True):
    """The content of the evaluation's `results.json`."""

    stage_table: list[StageScore] = []
    budget_curve: list[BudgetPoint] = []
    budget_references: References = References()
    rl_against_distillation: list[Method] = []
    think_follow: Scored | None = None
    long_context: list[LongContext] = []
    validation: list[Validation] = []
    conversations: list[Sampled] = []


class Lift(Part, frozen=True, kw_only=True):
    """A score before and after a stage."""

    before: Scored
    before_stage: str
    after: Scored
    after_stage: str
    points: float
    """The difference, as a share."""


class Headline(Part, frozen=True, kw_only=True):
    """The numbers of the summary; None for what the run has not reached."""

    thinking: StageScore | None
    non_thinking: StageScore | None
    mode_gap: float | None
    """Thinking less non-thinking, as a share."""
    rl: Lift | None
    think_follow: Scored | None
    budget_first: BudgetPoint | None
    budget_last: BudgetPoint | None
    student_rl: Method | None
    student_distilled: Method | None
    distillation_gain: float | None
    """pass@1 of distillation less that of reinforcement learning."""
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    ranks: int
    documents_in: int | None
    documents_out: int | None
    tokens_trained: int
    parameters: int | None


class Report(Results, frozen=True, kw_only=True):
    """Every number of the page."""

    format: int = 1
    recipe: str
    finished: str
    """When the newest artifact was done; UTC, ISO 8601."""
    headline: Headline
    stages: list[StageRow]
    unfinished: list[Draft]
    left_out: list[str]
    """Stages with artifacts that do not go with those shown: of other settings, or begun anew since."""
    funnel: list[FunnelRow]
    examples: list[ExamplesRow]
    languages: Languages | None
    scaling: Scaling | None = None
    training: list[Training]
    experts: list[ExpertShares] = []
    learned_budgets: LearnedBudgets | None = None
    evaluated: bool
    """Whether the evaluation's results were there."""
    versions: dict[str, str]
    """Distribution -> version; several, with commas, where stages were made with different ones."""
