"""CUDA kernels of fastmrc; tensors are on one device, `stream` is torch's stream as a number."""

from typing import Any

class Automata:
    def __init__(
        self,
        states: int,
        edges: int,
        count: int,
        edge_begin: Any,
        edge_token: Any,
        edge_target: Any,
        final_flags: Any,
        first_state: Any,
        first_edge: Any,
    ) -> None: ...
    def advance(
        self, n: int, automaton_of: Any, states: Any, tokens: Any, out: Any, fault: Any, stream: int
    ) -> None: ...
    def count_allowed(
        self, n: int, automaton_of: Any, states: Any, counts: Any, fault: Any, stream: int
    ) -> None: ...
    def write_allowed(
        self,
        n: int,
        total: int,
        automaton_of: Any,
        states: Any,
        offsets: Any,
        tokens: Any,
        fault: Any,
        stream: int,
    ) -> None: ...
    def final_flags(
        self, n: int, automaton_of: Any, states: Any, out: Any, fault: Any, stream: int
    ) -> None: ...

class BeamSearch:
    def __init__(
        self,
        questions: int,
        slots: int,
        steps: int,
        vocabulary_size: int,
        end_id: int,
        min_tokens: int,
        vote: str,
        finish: str,
        length_penalty: float,
        rows: int,
        state: Any,
        ancestors: Any,
        zeros: Any,
        fault: Any,
        workspace: Any,
    ) -> None: ...
    @staticmethod
    def workspace_bytes(
        questions: int, slots: int, vocabulary_size: int, finish: str, rows: int
    ) -> int: ...
    def first_step(self, logits: Any, surviving: Any, no_answer: Any, stream: int) -> None: ...
    def set_passages(
        self,
        passages: int,
        first_passage: Any,
        first_rows: Any,
        weights: Any,
        automata: Automata | None,
        automaton_of: Any,
        all_constrained: bool,
    ) -> None: ...
    def set_inputs(
        self,
        rows: int,
        prefix: int,
        columns: int,
        passage_row: Any,
        question_of: Any,
        first_position: Any,
        tokens: Any,
        positions: Any,
        mask: Any,
        cache_columns: Any,
        live: Any,
    ) -> None: ...
    def step(self, logits: Any, t: int, stream: int) -> None: ...
    def prepare(self, t: int, stream: int) -> None: ...

MAX_TOPK: int
NO_FAULT: int

def attention_sum(
    logits: Any,
    word_ids: Any,
    mask: Any,
    lengths: Any,
    k: int,
    words: Any,
    probs: Any,
    first: Any,
    fault: Any,
    workspace: Any,
    stream: int,
) -> None: ...
def attention_sum_bytes(rows: int, cols: int, k: int) -> int: ...
def beam_step(
    logits: Any,
    argmax: Any,
    logsumexp: Any,
    questions: int,
    slots: int,
    passages: int,
    hypotheses: Any,
    first_passage: Any,
    passage_row: Any,
    weights: Any,
    scores: Any,
    states: Any,
    automata: Automata | None,
    automaton_of: Any,
    all_constrained: bool,
    allow_end: Any,
    vote: str,
    end_id: int,
    width: int,
    best_scores: Any,
    tokens: Any,
    parents: Any,
    fault: Any,
    workspace: Any,
    stream: int,
) -> None: ...
def beam_step_bytes(
    cols: int, questions: int, slots: int, width: int, all_constrained: bool
) -> int: ...
def beams_items(questions: int, slots: int, steps: int) -> int: ...
def best_spans(
    start: Any,
    end: Any,
    mask: Any,
    null_position: int,
    max_length: int,
    k: int,
    scores: Any,
    starts: Any,
    ends: Any,
    null_scores: Any,
    fault: Any,
    workspace: Any,
    stream: int,
) -> None: ...
def best_spans_bytes(rows: int, cols: int, k: int) -> int: ...
def device_count() -> int: ...
def fault_message(code: int, name: str, vocabulary_size: int, end_id: int) -> str: ...
def is_emulated() -> bool: ...
def row_pass(
    x: Any,
    live: Any,
    max: Any,
    argmax: Any,
    logsumexp: Any,
    k: int,
    values: Any,
    ids: Any,
    log_softmax: bool,
    fault: Any,
    counters: Any,
    workspace: Any,
    stream: int,
) -> None: ...
def row_pass_bytes(rows: int, cols: int, k: int) -> int: ...
def runs_on(device: int) -> bool: ...
def sample(
    logits: Any,
    automata: Automata | None,
    automaton_of: Any,
    states: Any,
    allow_end: Any,
    end_id: int,
    top_k: int,
    top_p: float,
    temperature: float,
    seed: int,
    draws: int,
    row_of: Any,
    streams: Any,
    positions: Any,
    max: Any,
    argmax: Any,
    logsumexp: Any,
    tokens: Any,
    log_probs: Any,
    fault: Any,
    workspace: Any,
    stream: int,
) -> None: ...
def sample_bytes(rows: int, cols: int) -> int: ...
def slot_topk_bytes(passages: int, slots: int, width: int) -> int: ...
def slots(
    logits: Any,
    passages: int,
    slots: int,
    width: int,
    max: Any,
    argmax: Any,
    logsumexp: Any,
    automata: Automata | None,
    automaton_of: Any,
    end_id: int,
    min_tokens: int,
    tokens: Any,
    lengths: Any,
    scores: Any,
    fault: Any,
    workspace: Any,
    stream: int,
) -> None: ...
