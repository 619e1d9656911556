"""Random circuits of all kinds, by name."""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from brute_force import Case, Enumeration

LENGTH, VOCAB, STATES = 4, 4, 3


def random_case(
    seed: int = 0,
    batch: int = 3,
    length: int = LENGTH,
    vocab: int = VOCAB,
    states: int = STATES,
    tied_transition: bool = True,
    tied_emission: bool = True,
    observed: str = "mixed",
    present: str = "all",
    context: float = 0.0,
    spread: float = 1.5,
    logit_spread: float = 2.0,
    dtype: torch.dtype = torch.float32,
    tied_to_embedding: bool = False,
    copies: float = 0.0,
    top_k: int | None = None,
    grouped: bool = False,
    **options,
) -> Case:
    """Unnormalised normal log-potentials of standard deviation `spread`, in float32 numbers.

    `context` and `copies` are the standard deviations of what the context does.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    masks = {
        "none": torch.zeros(batch, length, dtype=torch.bool),
        "all": torch.ones(batch, length, dtype=torch.bool),
        "mixed": torch.rand(batch, length, generator=g) < 0.5,
    }
    there = torch.ones(batch, length, dtype=torch.bool)
    if present == "leading":
        there[0::2, :2] = False
    elif present == "interior":
        there[:, 1] = False
        there[1::2, 2] = False
    elif present == "trailing":
        there[0::2, -1] = False
        there[1::2, -3:] = False
    elif present == "scattered":
        there = torch.rand(batch, length, generator=g) < 0.5
        there[:, 1] = True
    elif present == "one row without any":
        there[0] = False
    tokens = torch.randint(vocab, (batch, length), generator=g)
    arguments = {"tokens": tokens, "observed": masks[observed], "present": there}
    if context:
        arguments["context"] = context * normal(batch, length, states)
    steps = 1 if tied_transition else length - 1
    case = Case(
        logits=(logit_spread * normal(batch, length, vocab)).to(dtype),
        initial=spread * normal(states),
        transition=spread * normal(steps, states, states),
        emission=spread * normal(1 if tied_emission else length, states, vocab),
        options=arguments | options,
        top_k=top_k,
        grouped=grouped,
    )
    if tied_to_embedding:
        rank, size = 2, 3
        case.emission = None
        case.latents, case.projection = spread * normal(states, rank), normal(rank, size)
        case.embedding, case.bias = normal(vocab, size), spread * normal(vocab)
    if copies:
        case.copied = torch.randint(vocab, (batch, 3), generator=g)
        case.start, case.follow = (copies * normal(batch, length, 3) for _ in range(2))
        case.emitted, case.out = (-copies * normal(batch, 3, states).abs() for _ in range(2))
        case.copy_weight = copies * normal(batch, 3)
    if top_k is not None:
        case.log_marginal = normal(vocab)
        if "forbidden" in options:
            case.log_marginal.masked_fill_(options["forbidden"], -torch.inf)
    return case


def hard_zero_case(seed: int = 0, **kwargs) -> Case:
    """Many potentials and some logits are exactly zero, but no row is impossible."""
    case = random_case(seed, **kwargs)
    g = torch.Generator().manual_seed(seed + 100)
    for name, potential in case.leaves().items():
        if name in ("logits", "context", "latents", "projection"):
            continue
        dead = torch.rand(potential.shape, generator=g) < 0.4
        # State 0 and token 0 stay possible, so that every row keeps a completion.
        dead[..., 0] = False
        setattr(case, name, potential.masked_fill(dead, -torch.inf))
    dead = torch.rand(case.logits.shape, generator=g) < 0.4
    dead[..., 0] = False
    case.logits = case.logits.masked_fill(dead, -torch.inf)
    return case


def one_hot_logits_case(seed: int = 0, **kwargs) -> Case:
    """The backbone allows a single token at every other position."""
    case = random_case(seed, **kwargs)
    best = case.logits.argmax(-1, keepdim=True)
    one_hot = torch.full_like(case.logits, -torch.inf).scatter(-1, best, 0.0)
    case.logits[:, ::2] = one_hot[:, ::2]
    return case


FORBIDDEN = torch.tensor([False, True, False, False])

CASES = {
    "tied": random_case(1),
    "untied transitions": random_case(2, tied_transition=False),
    "untied emissions": random_case(3, tied_emission=False),
    "untied": random_case(4, tied_transition=False, tied_emission=False),
    "batch of one": random_case(5, batch=1),
    "batch of nine": random_case(6, batch=9, tied_transition=False),
    "one position": random_case(7, length=1),
    "one state": random_case(8, states=1),
    "all masked": random_case(9, observed="none"),
    "none masked": random_case(10, observed="all"),
    "absent at the start": random_case(
        11, present="leading", tied_transition=False, tied_emission=False
    ),
    "absent inside": random_case(
        12, present="interior", tied_transition=False, tied_emission=False
    ),
    "absent at the end": random_case(13, present="trailing", tied_transition=False),
    "absent anywhere": random_case(
        14, batch=8, present="scattered", tied_transition=False, context=1.0
    ),
    "absent everywhere in a row": random_case(15, present="one row without any"),
    "context": random_case(16, context=3.0),
    "context, all observed": random_case(17, context=3.0, observed="all"),
    "strong context": random_case(18, context=100.0, tied_emission=False),
    "sharp evidence": random_case(19, temperature=0.1),
    "flat evidence": random_case(20, temperature=3.0),
    "one-hot evidence by temperature": random_case(21, observed="none", temperature=0.01),
    "one-hot evidence by temperature, untied": random_case(
        22, tied_transition=False, tied_emission=False, temperature=0.01
    ),
    "one-hot evidence by logits": one_hot_logits_case(23, observed="none"),
    "forbidden token": random_case(24, observed="none", forbidden=FORBIDDEN),
    "inactive rows": random_case(
        25, batch=4, context=1.0, active=torch.tensor([True, False, True, False])
    ),
    "hard zeros": hard_zero_case(26, batch=6, observed="none"),
    "hard zeros, untied": hard_zero_case(
        27, batch=6, observed="none", tied_transition=False, tied_emission=False
    ),
    "bfloat16 logits": random_case(28, dtype=torch.bfloat16, temperature=0.5),
    "float16 logits": random_case(29, dtype=torch.float16),
    "potentials over hundreds of nats": random_case(30, batch=6, spread=120.0),
    "potentials over hundreds of nats, untied": random_case(
        31, batch=6, spread=120.0, tied_transition=False, tied_emission=False, context=50.0
    ),
    "long and narrow, hundreds of nats": random_case(
        32, batch=4, length=7, vocab=2, states=2, spread=60.0, logit_spread=60.0
    ),
    "long and narrow": random_case(
        33, batch=4, length=7, vocab=2, states=2, tied_transition=False, present="scattered"
    ),
}

CONTEXTS = {
    "no context": {},
    "latent": {"context": 1.0},
    "copies": {"copies": 1.0},
    "all of them": {"context": 1.0, "copies": 1.0},
}


def structures() -> dict[str, Case]:
    """Every combination of structures, each with some positions observed and some absent."""
    cases = {}
    presence = ["scattered", "interior", "all", "leading", "trailing"]
    for number, (tied_steps, to_embedding, name) in enumerate(
        product((True, False), (False, True), CONTEXTS)
    ):
        words = [
            "tied steps" if tied_steps else "untied steps",
            "tied to the embedding" if to_embedding else "dense emission",
            name,
        ]
        cases[", ".join(words)] = random_case(
            200 + number,
            batch=2,
            length=3,
            vocab=3,
            states=4,
            tied_transition=tied_steps,
            present=presence[(number + number // 4) % 5],
            tied_to_embedding=to_embedding,
            **CONTEXTS[name],
        )
    return cases


STRUCTURES = structures()

EVERYTHING = {
    "states": 4,
    "tied_to_embedding": True,
    "context": 1.0,
    "copies": 1.0,
}

TOP_K = {
    "top 1": random_case(300, top_k=1),
    "top 2, untied": random_case(301, top_k=2, tied_transition=False, tied_emission=False),
    "top 2, forbidden token": random_case(303, top_k=2, forbidden=FORBIDDEN, temperature=0.7),
    "top 2, one-hot by temperature": random_case(304, top_k=2, temperature=0.01),
    "top 2, absent anywhere": random_case(305, batch=6, top_k=2, present="scattered"),
    "top 2, everything": random_case(306, length=3, top_k=2, **EVERYTHING),
    "top 1, grouped": random_case(330, vocab=6, top_k=1, grouped=True),
    "top 2, grouped, forbidden token": random_case(
        331, top_k=2, grouped=True, forbidden=FORBIDDEN, temperature=0.7
    ),
    "top 2, grouped, absent anywhere": random_case(
        332, batch=6, vocab=6, top_k=2, grouped=True, present="scattered"
    ),
    "top 2, grouped, everything": random_case(
        333, length=3, vocab=5, top_k=2, grouped=True, **EVERYTHING
    ),
    "all tokens listed, grouped": random_case(334, top_k=VOCAB, grouped=True),
    "all tokens listed": random_case(307, top_k=VOCAB, temperature=0.5),
}

STRUCTURED = {
    "inactive rows, everything": random_case(
        310,
        batch=4,
        length=3,
        active=torch.tensor([True, False, True, False]),
        tied_transition=False,
        **EVERYTHING,
    ),
    "one position, everything": random_case(311, length=1, **EVERYTHING),
    "hard zeros, everything": hard_zero_case(
        312, batch=6, length=3, observed="none", tied_transition=False, **EVERYTHING
    ),
    "hard zeros, copies": hard_zero_case(
        313, batch=6, length=3, observed="none", states=4, copies=1.0
    ),
    "hard zeros, top 2": hard_zero_case(315, batch=6, observed="none", top_k=2),
    "strong copies": random_case(321, batch=6, length=3, states=4, copies=100.0),
    "strong everything": random_case(
        319, batch=6, length=3, **(EVERYTHING | dict.fromkeys(CONTEXTS["all of them"], 60.0))
    ),
    "tied emissions over hundreds of nats": random_case(
        320, batch=6, length=3, states=4, tied_to_embedding=True, spread=80.0
    ),
}

CASES = CASES | STRUCTURES | TOP_K | STRUCTURED


def underflow_case() -> Case:
    """Some rows need the log-space repetition and the others do not.

    The circuit stays in the state it starts in, so a row whose evidence contradicts the likely
    start by hundreds of nats loses all its mass in ordinary float32 arithmetic.
    """
    case = random_case(40, batch=4, observed="none", tied_transition=False)
    case.transition = torch.where(torch.eye(STATES, dtype=torch.bool), 0.0, -200.0)[None]
    case.transition = case.transition.repeat(LENGTH - 1, 1, 1)
    context = torch.zeros(4, LENGTH, STATES)
    context[1, 2] = torch.tensor([-300.0, 0.0, -300.0])
    context[1, 1] = torch.tensor([0.0, -300.0, 0.0])
    context[3, 3] = torch.tensor([0.0, -250.0, -400.0])
    context[3, 0] = torch.tensor([-500.0, -100.0, 0.0])
    case.options["context"] = context
    return case


def slow_loss_case() -> Case:
    """A state that starts 120 nats behind and gains 20 nats at every step: it wins in the end."""
    length = 9
    case = random_case(41, batch=2, length=length, vocab=2, states=2, observed="none", spread=0.1)
    case.initial = torch.tensor([0.0, -120.0])
    case.transition = torch.tensor([[[0.0, -torch.inf], [-torch.inf, 0.0]]])
    context = torch.zeros(2, length, 2)
    context[0, :, 0] = -20.0
    case.options["context"] = context
    return case


def ruled_out_winner_case() -> Case:
    """A state that the start rules out would have won by hundreds of nats."""
    case = slow_loss_case()
    case.initial = torch.tensor([0.0, -torch.inf])
    return case


def slow_loss_backward_case() -> Case:
    """The same seen from the other end: only later evidence tells the states apart."""
    case = slow_loss_case()
    case.initial = torch.tensor([0.0, 0.0])
    case.options["context"] = torch.zeros(2, 9, 2)
    case.options["context"][0, :, 0] = -20.0
    case.options["context"][0, -1] = torch.tensor([0.0, -150.0])
    return case


def forced_state_case() -> Case:
    """The state that the circuit must be in can only emit what the backbone all but rules out."""
    case = random_case(42, batch=2, vocab=2, states=2, observed="none")
    case.initial = torch.tensor([-torch.inf, 0.0])
    case.transition = torch.tensor([[[0.0, -torch.inf], [-torch.inf, 0.0]]])
    case.emission = torch.tensor([[[0.0, -torch.inf], [-torch.inf, 0.0]]])
    case.logits = torch.tensor([1.5, 0.0]).expand(2, LENGTH, 2).clone()
    case.logits[1] = 0.0
    case.options["temperature"] = 0.01
    return case


def nearly_forced_state_case() -> Case:
    """The evidence of the only possible state is a denormal number in float32."""
    case = forced_state_case()
    case.logits = torch.tensor([0.995, 0.0]).expand(2, LENGTH, 2).clone()
    case.logits[1] = 0.0
    return case


def copies_underflow_case() -> Case:
    """The only way to where the evidence is leads through copy states hundreds of nats away."""
    case = random_case(45, batch=3, length=3, vocab=2, observed="none", spread=0.3, states=4)
    case.transition = torch.where(torch.eye(4).bool(), 0.0, -torch.inf)[None]
    context = torch.zeros(3, 3, 4)
    context[:, 0] = torch.tensor([0.0, -300.0, -300.0, -400.0])
    context[:, 2] = torch.tensor([-400.0, -300.0, 0.0, -300.0])
    case.options["context"] = context
    case.copied = torch.tensor([0, 1]).repeat(3, 1)
    case.start = torch.full((3, 3, 2), -150.0)
    case.start[1, :, 0] = -500.0
    case.follow = torch.full((3, 3, 2), -100.0)
    case.emitted = torch.zeros(3, 2, 4)
    case.out = torch.zeros(3, 2, 4)
    case.out[0, 0] = torch.tensor([0.0, -400.0, -250.0, -100.0])
    case.copy_weight = torch.zeros(3, 2)
    return case


AWKWARD = {
    "rows that underflow and rows that do not": underflow_case(),
    "a state that falls behind early and wins late": slow_loss_case(),
    "a state that only the last token supports": slow_loss_backward_case(),
    "a ruled-out state that would have won": ruled_out_winner_case(),
    "a forced state that the backbone all but rules out": forced_state_case(),
    "a forced state with denormal evidence": nearly_forced_state_case(),
    "a tiny copied step that is the only way": copies_underflow_case(),
}

ALL = CASES | AWKWARD


@cache
def enumerations(name: str) -> list[Enumeration]:
    """Those of the rows of `ALL[name]`, which no test changes."""
    return [ALL[name].enumerate(row) for row in range(len(ALL[name]))]


def every_completion(case: Case, row: int) -> torch.Tensor:
    """`[X, B, L]`: the completions of one row; 0 in the others."""
    exact = case.enumerate(row)
    value = torch.zeros(len(exact.tokens), *case.logits.shape[:2], dtype=torch.long)
    value[:, row] = exact.on_canvas(exact.tokens)
    return value


def impossible_case() -> Case:
    """Row 0: no completion is possible; row 1: the circuit starts in state 0, which is possible."""
    case = random_case(50, batch=2, observed="none")
    case.emission = case.emission.clone()
    case.emission[:, :, 3] = -torch.inf
    case.logits[0, 2] = torch.tensor([-torch.inf, -torch.inf, -torch.inf, 0.0])
    return case
