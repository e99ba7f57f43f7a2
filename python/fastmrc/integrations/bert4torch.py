"""bert4torch's decoder with selection and sampling by the native engine.

Code written for bert4torch 0.6 changes one import::

    from fastmrc.integrations.bert4torch import AutoRegressiveDecoder  # was: bert4torch.generation

The interface is that of bert4torch 0.6.1 (github.com/Tongjilibo/bert4torch,
``bert4torch/generation``), which needs not be installed. `AutoRegressiveDecoder` lists where this
one does otherwise.
"""

from __future__ import annotations

import functools
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from fastmrc import ops
from fastmrc.cuda.runtime import has_kernels
from fastmrc.errors import InputError
from fastmrc.options import NUCLEUS_SLACK

__all__ = ["AutoRegressiveDecoder"]

EPS = 1e-12
"""Added to a probability before its logarithm."""

Rtype = Literal["probas", "logits"]
_RTYPES: tuple[Rtype, ...] = ("probas", "logits")

# Names of earlier versions. Version 0.6 ignores them, and then nothing ends a sequence.
_FORMER_NAMES = {
    "start_id": "bos_token_id",
    "end_id": "eos_token_id",
    "maxlen": "max_new_tokens",
    "minlen": "min_new_tokens",
    "pad_id": "pad_token_id",
    "topk": "top_k",
    "topp": "top_p",
}

Ids = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


class AutoRegressiveDecoder:
    """Beam search and sampling with a model that a subclass calls in `predict`.

    Parameters
    ----------
    bos_token_id
        Token that every sequence begins with; it counts as one of its tokens. None: there is none.
    eos_token_id
        Token that ends a sequence, or a list of such tokens and of lists of tokens that end one
        together. By default none: -1 is no token.
    max_new_tokens
        Largest number of steps. None: as many as `max_length` admits.
    min_new_tokens
        A sequence of fewer tokens (`bos_token_id` and ends counted) is not finished by an end. An
        end token may still be chosen; it stays in the sequence, which goes on.
    max_length
        Largest length of input and output together, where `max_new_tokens` is None; tokens in
        ``states["past_key_values"]`` count.
    pad_token_id, padding_side
        What fills shorter token lists of a batch, and on which side: ``"right"`` or ``"left"``.
    device
        Where `output_ids`, inputs given as lists and results are. Tensors in a list of inputs stay
        where they are.
    n
        Sequences that `random_sample` draws.
    top_k
        The beam size of `beam_search`. For `random_sample`: only so many of the likeliest tokens
        may be drawn; None: all.
    top_p
        Only the fewest likeliest tokens whose probabilities add up to this share, 0 to 1.
    temperature
        Logits are divided by it, at least 0. 0 is the same as ``do_sample=False``.
    repetition_penalty
        What was said before becomes less likely: logits above 0 are divided by it and others
        multiplied, those of the tokens of the first input and of the output.
    do_sample
        Whether penalty, temperature, `top_k` and `top_p` act on what `predict` returns. If not,
        `random_sample` takes the likeliest token. They act in a beam search, too: of logits, the
        probabilities of the `top_k` likeliest tokens of each row add up to 1 there, unless
        ``do_sample=False``.
    min_ends
        A sequence is finished by an end if it has at least so many.
    **generation_config
        Further settings, as for `set_generation_config`.

    Attributes
    ----------
    use_batch
        False: the inputs are those of one sample, each a token list or a tensor [1, ...]. True:
        each input is a list of token lists, or a tensor [samples, ...].
    return_states
        Whether results come together with the states.
    return_last_token
        Whether a stream gives the last token only.
    first_output_ids : torch.Tensor
        int64 [1, 0], or [1, 1] with `bos_token_id`: what outputs begin with. May be replaced by a
        longer beginning.
    step : int
        Number of the step, while `predict` runs.
    flag : torch.Tensor or None
        bool, which of the sequences that the last step chose go on: rows of a cache are chosen by
        it. None in the first step.
    input_seqlen : torch.Tensor
        int64 [samples], length of the last input if that was given as token lists (with left
        padding or as one tensor: its width), else 0. With `use_batch` one entry per row of
        `output_ids`.
    top_k : int or list of int
        While a beam search runs, how many hypotheses are alive: a number, or with `use_batch` one
        for each sample.
    result_scores : list of float
        Scores of the results of the last `beam_search`: sums of log(probability + 1e-12).

    Raises
    ------
    InputError
        If a value is out of range, or for a former name of a setting, such as ``end_id``.
    TypeError
        If a value has the wrong type.

    Notes
    -----
    Hypotheses are ordered by score, then lower token, then lower parent. As in bert4torch, a
    search (of one sample) is over when its best hypothesis is finished; finished ones that are
    not the best are dropped and the beam shrinks by their number; whoever leads after the last
    step is the result. Where bert4torch 0.6.1 does otherwise than this class:

    - The order of equal scores is left to torch's sort there, and in sampling `top_k` keeps all
      tokens that tie with the last one.
    - `top_k` stays shrunk, or a list, after a beam search, so that a second one fails or is
      narrower. Here settings are as before, also after an exception; those given in a call are
      kept, as there, except that a stream there leaves ``n=1``.
    - The states of a beam search are not put in order there: a hypothesis may go on with the cache
      of another. Here `reorder_states` does so.
    - ``default_rtype="probas"``: temperature divides probabilities there (to no effect), `top_k`
      and `top_p` put -inf for what is left out, which becomes NaN. Here the temperature T makes p
      proportional to p ** (1 / T), and what is left out has probability 0.
    - An end of several tokens counts once at most there, and must be a list; here it counts
      wherever it stands. A place where two ends stop counts once.
    - A single beam search whose hypotheses end before `min_new_tokens` has a `flag` there that says
      they are dropped, but they are not.
    - `input_seqlen` of a batch is not shortened there when rows are dropped.
    - Penalty, temperature, `top_k` and `top_p` are put into ``prepared_logits_processor`` there,
      once, by `do_sample` and `temperature` of the constructor. Here is no such list, and the two
      may change later.
    - States must be a dictionary there; here they may be anything. Their past tokens reduce
      `max_new_tokens` there.
    - Scores are float32 here for any type of logits, also float64, float16 and bfloat16.
    - `set_generation_config` changes the dictionary of the caller there, ignores former names and
      replaces methods.
    - A beam larger than the vocabulary fails there; here it grows in the second step.
    - That the input leaves no room below `max_length` is logged there, and is a warning here.
    - Gradients are not recorded here.

    One decoder runs one search at a time. `wraps` belongs to the class: what ``set_default_rtype``
    and ``set_use_states`` change holds for all its objects, as there.
    """

    def __init__(
        self,
        bos_token_id: int | None = None,
        eos_token_id: Any = -1,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 1,
        max_length: int | None = 64,
        pad_token_id: int = 0,
        padding_side: Literal["left", "right"] = "right",
        device: str | torch.device = "cpu",
        n: int = 1,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        repetition_penalty: float = 1.0,
        do_sample: bool = True,
        min_ends: int = 1,
        **generation_config: Any,
    ) -> None:
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.max_new_tokens = max_new_tokens
        self.min_new_tokens = min_new_tokens
        self.max_length = max_length
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        self.device = device
        self.n = n
        self.top_k: Any = top_k
        self.top_p = top_p
        self.temperature = temperature
        self.repetition_penalty = repetition_penalty
        self.do_sample = do_sample
        self.min_ends = min_ends
        self.return_last_token = False
        self.return_states = False
        self.use_batch = False
        self.step = 0
        self.flag: torch.Tensor | None = None
        self.input_seqlen = torch.zeros(0, dtype=torch.long)
        self.result_scores: list[float] = []
        self._running: _Settings | None = None
        self._set_first_output_ids()
        self.set_generation_config(generation_config)

    def set_generation_config(self, kwargs: Mapping[str, Any]) -> None:
        """Change settings, for this and all later calls.

        Parameters
        ----------
        kwargs
            New values of attributes by their names, also of a subclass; those below a key
            ``generation_config`` count, too. Other names have no effect.

        Raises
        ------
        InputError
            For a value out of range, a former name of a setting or the name of a method.
        TypeError
            For a value of a wrong type.
        """
        given = {key: value for key, value in kwargs.items() if key != "generation_config"}
        given |= dict(kwargs.get("generation_config") or {})
        for name in given:
            if callable(getattr(AutoRegressiveDecoder, name, None)):
                raise InputError(f"generation_config: expected names of settings, got {name!r}")
            if name in _FORMER_NAMES and not hasattr(self, name):
                raise InputError(f"{name}: expected its present name, {_FORMER_NAMES[name]!r}")
        before = {name: getattr(self, name) for name in given if hasattr(self, name)}
        try:
            for name in before:
                setattr(self, name, given[name])
            _Settings.of(self)
            if "bos_token_id" in given or "device" in given:
                self._set_first_output_ids()
        except Exception:
            for name, value in before.items():
                setattr(self, name, value)
            raise

    @staticmethod
    def wraps(
        default_rtype: Rtype = "probas", use_states: bool = False
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Make a method of three arguments the `predict` that the searches call.

        Parameters
        ----------
        default_rtype
            What the method returns: ``"logits"`` before the softmax, or ``"probas"``, which need
            not add up to 1.
        use_states
            Whether it returns a pair (scores, states); the next step is given these states. Else
            states are None from the second step on.

        Returns
        -------
        Callable
            A decorator. The method it makes takes a fourth argument `rtype` (default: as the method
            returns) and returns probabilities, or their logarithms for ``rtype="logits"``, after
            penalty, temperature, `top_k` and `top_p`, float32 [rows, V], and the states (or None).
            Its attributes ``set_default_rtype`` and ``set_use_states`` change the above.

        Raises
        ------
        InputError
            If `default_rtype` is another word.
        """
        contract = _Contract(_checked_rtype("default_rtype", default_rtype), bool(use_states))

        def decorate(predict: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(predict)
            def complete(
                self: AutoRegressiveDecoder,
                inputs: Any,
                output_ids: torch.Tensor,
                states: Any = None,
                rtype: Rtype | None = None,
            ) -> tuple[torch.Tensor, Any]:
                wanted = _checked_rtype("rtype", contract.rtype if rtype is None else rtype)
                values, states = contract.split(predict(self, inputs, output_ids, states))
                prediction = self._prediction(values, contract.rtype, inputs, output_ids, states)
                probas = _probabilities(prediction, self._settings())
                return (probas if wanted == "probas" else torch.log(probas + EPS)), states

            # The searches read what predict returns itself: of most of it no one needs the softmax.
            method = cast("Any", complete)
            method.own = predict
            method.contract = contract
            method.set_default_rtype = contract.set_rtype
            method.set_use_states = contract.set_use_states
            return complete

        return decorate

    def predict(self, inputs: Any, output_ids: torch.Tensor, states: Any = None, *more: Any) -> Any:
        """Return scores of the next token after each row; a subclass defines it.

        Decorate it with `wraps`. Without, it is called with a fourth argument and must return a
        pair: float [rows, V] (log-probabilities if the argument is ``"logits"``, probabilities if
        it is ``"probas"``) and states.

        Parameters
        ----------
        inputs
            List of tensors [rows, ...]; in the first step [samples, ...].
        output_ids
            int64 [rows, length], the tokens so far, `bos_token_id` included.
        states
            What the last step returned; in the first what the search was given.
        *more
            The result type, where the method is not decorated.

        Returns
        -------
        torch.Tensor or tuple
            Floating point [rows, V], and states if there are any.
        """
        raise NotImplementedError("predict: expected a method of the subclass")

    def reorder_states(self, states: Any, parents: torch.Tensor) -> Any:
        """Return the states of a beam search in the order of its new hypotheses.

        Called before `predict` from the third step on where the order changed; in the second one
        all hypotheses of a sample have the same past. `flag` is about the new order. This method
        knows ``states["past_key_values"]``: tensors [rows, ...], in tuples or lists, or a cache
        with a method ``reorder_cache``, which is changed. Override it for other states, or to
        return them as they are.

        Parameters
        ----------
        states
            What `predict` returned.
        parents
            int64 [chosen], on `device`: row of `predict` that each chosen hypothesis continues.

        Returns
        -------
        object
            New states; those given are not changed, but for a cache.
        """
        if not isinstance(states, dict) or states.get("past_key_values") is None:
            return states
        past = states["past_key_values"]
        if hasattr(past, "reorder_cache"):
            past.reorder_cache(parents)
            return states
        return states | {"past_key_values": _take_rows(past, parents)}

    def beam_search(self, inputs: Any, states: Any = None, **generation_config: Any) -> Any:
        """Search the best sequence of each sample.

        Parameters
        ----------
        inputs
            A list of inputs: token lists (or, with `use_batch`, lists of them) and tensors; or one
            token list or tensor.
        states
            What `predict` gets in the first step.
        **generation_config
            Settings, as for `set_generation_config`; `top_k`, the beam size, is needed.

        Returns
        -------
        list of torch.Tensor
            int64 [length], one for each sample, `bos_token_id` and ends included. With
            `return_states`: a pair of this and the states.

        Raises
        ------
        InputError
            If inputs or a setting are wrong, or what `predict` returns has the wrong shape, NaN,
            infinity or nothing to choose from.
        TypeError
            For a wrong type of inputs or of what `predict` returns.
        """
        found = _Found()
        for _ in self._beam_steps(inputs, states, generation_config, found):
            pass
        samples = sorted(found.sequences)
        self.result_scores = [found.scores[sample] for sample in samples]
        results = [self._tensor(found.sequences[sample]) for sample in samples]
        return (results, found.states) if self.return_states else results

    def stream_beam_search(
        self, inputs: Any, states: Any = None, **generation_config: Any
    ) -> Iterator[Any]:
        """Give the best hypothesis after every step of a beam search for one sample.

        Parameters
        ----------
        inputs, states, **generation_config
            As for `beam_search`.

        Yields
        ------
        list of torch.Tensor
            int64 [length], one; with `return_last_token` its last token, [1]. With
            `return_states`: a pair of this and the states.

        Raises
        ------
        InputError, TypeError
            As `beam_search`, and if there is more than one sample.
        """
        for live in self._beam_steps(inputs, states, generation_config, _Found(), stream=True):
            best = [self._tensor(live.tokens[0, -1 if self.return_last_token else 0 :])]
            yield (best, live.states) if self.return_states else best

    def random_sample(self, inputs_raw: Any, states: Any = None, **generation_config: Any) -> Any:
        """Draw sequences: `n` for one sample, or one for each sample of a batch.

        The seed comes from torch's default generator at the beginning of each call; after
        ``torch.manual_seed`` the results are the same on any device. Sequence i takes its random
        numbers from stream i of a counter-based generator, see `fastmrc.ops.sample`.

        Parameters
        ----------
        inputs_raw, states, **generation_config
            As for `beam_search`; `top_k` may be None.

        Returns
        -------
        list of torch.Tensor
            int64 [length], in the order in which they were finished, with `use_batch` in that of
            the samples. With `return_states`: a pair of this and the states.

        Raises
        ------
        InputError, TypeError
            As `beam_search`, and for `n` above 1 together with `use_batch`.
        """
        found = _Found()
        for _ in self._sample_steps(inputs_raw, states, generation_config, found):
            pass
        order = sorted(found.sequences) if self.use_batch else list(found.sequences)
        results = [self._tensor(found.sequences[sequence]) for sequence in order]
        return (results, found.states) if self.return_states else results

    def stream_random_sample(
        self, inputs_raw: Any, states: Any = None, **generation_config: Any
    ) -> Iterator[Any]:
        """Draw one sequence and give it after every step.

        Parameters
        ----------
        inputs_raw, states, **generation_config
            As for `random_sample`; `n` has no effect.

        Yields
        ------
        torch.Tensor
            int64 [1, length]; with `return_last_token` [1, 1]. With `return_states`: a pair of
            this and the states.

        Raises
        ------
        InputError, TypeError
            As `random_sample`, and if there is more than one sample.
        """
        found = _Found()
        for live in self._sample_steps(inputs_raw, states, generation_config, found, stream=True):
            tokens = self._tensor(live.tokens[:, -1 if self.return_last_token else 0 :])
            yield (tokens, live.states) if self.return_states else tokens

    # --- searches ---------------------------------------------------------------------------------

    def _beam_steps(
        self,
        inputs: Any,
        states: Any,
        config: Mapping[str, Any],
        found: _Found,
        stream: bool = False,
    ) -> Iterator[_Live]:
        """Give the hypotheses that each step chose; put results into `found`."""
        with self._search(config) as settings:
            beam_size = settings.top_k
            if beam_size is None:
                raise InputError("top_k: expected the beam size, got None")
            live = self._start(inputs, states, single=stream or not self.use_batch)
            beams = np.full(len(live.tokens), beam_size)
            for step in range(self._most_steps(states)):
                self.step = step
                self.top_k = beams.tolist() if self.use_batch else int(beams[0])
                prediction = self._evaluate(live, "logits")
                self._extend(live, _best_continuations(prediction, live, beams, settings))
                yield live
                self._drop_finished_beams(live, beams, found, settings)
                if len(live.tokens) == 0:
                    break
            for row in _starts(live.owner).tolist():
                found.add(int(live.owner[row]), live, row)
            found.states = live.states

    def _sample_steps(
        self,
        inputs: Any,
        states: Any,
        config: Mapping[str, Any],
        found: _Found,
        stream: bool = False,
    ) -> Iterator[_Live]:
        """Give the sequences after each step; put those that are finished into `found`."""
        with self._search(config) as settings:
            live = self._start(inputs, states, single=stream)
            copies = 1 if stream else self.n
            if self.use_batch and copies > 1:
                raise InputError(f"n: expected 1 with use_batch, got {copies}")
            seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64))
            for step in range(self._most_steps(states)):
                self.step = step
                prediction = self._evaluate(live, "probas")
                if step == 0 and copies > 1:
                    tiled = np.tile(np.arange(len(live.tokens)), copies)
                    prediction = prediction.take(tiled)
                    self._take(live, tiled)
                    live.owner = np.arange(len(tiled))
                live.append(_draw(prediction, settings, seed, live.owner, step))
                yield live
                self._drop_finished_sequences(live, found, settings)
                if len(live.tokens) == 0:
                    break
            for row, sequence in enumerate(live.owner.tolist()):
                found.add(sequence, live, row)
            found.states = live.states

    @contextmanager
    def _search(self, config: Mapping[str, Any]) -> Iterator[_Settings]:
        """Take over settings for a search; they are as before, and `flag` None, at its end."""
        self.set_generation_config(config)
        settings = _Settings.of(self)
        self._running, self.flag = settings, None
        try:
            yield settings
        finally:
            self._running, self.flag = None, None
            self.top_k = settings.top_k

    def _start(self, inputs: Any, states: Any, single: bool) -> _Live:
        tensors = self._to_tensors(inputs)
        rows = len(tensors[0])
        for i, tensor in enumerate(tensors):
            if len(tensor) != rows or rows == 0:
                expected = f"{rows} rows as inputs[0]" if rows else "at least one row"
                raise InputError(f"inputs[{i}]: expected {expected}, got {len(tensor)}")
        if single and rows > 1:
            raise InputError(
                f"inputs: expected one row, got {rows}; several need use_batch, and no stream"
            )
        first: Ids = self.first_output_ids.cpu().numpy().astype(np.int64)
        return _Live(
            inputs=tensors,
            tokens=first.repeat(rows, axis=0),
            owner=np.arange(rows),
            scores=np.zeros(rows, np.float32),
            states=states,
        )

    def _most_steps(self, states: Any) -> int:
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            raise InputError("max_new_tokens: expected a number where max_length is None, got None")
        longest = int(self.input_seqlen.max()) + _past_length(states)
        if longest >= self.max_length:
            warnings.warn(
                f"max_length: expected more than the {longest} tokens given, "
                f"got {self.max_length}; nothing is generated",
                stacklevel=4,
            )
        return max(0, self.max_length - longest)

    def _evaluate(self, live: _Live, rtype: Rtype) -> _Prediction:
        """Call `predict` for the live rows."""
        parents = None if live.states is None else live.parents
        if parents is not None and not np.array_equal(parents, np.arange(len(parents))):
            live.states = self.reorder_states(live.states, self._tensor(parents))
        output_ids = self._tensor(live.tokens)
        predict: Any = self.predict
        contract = getattr(predict, "contract", None)
        with torch.no_grad():
            if contract is None:
                given = predict(live.inputs, output_ids, live.states, rtype)
                values, live.states = _pair(given, "of a method without wraps")
                kind: Kind = "scores" if rtype == "logits" else "final"
                return _Prediction(_checked_values(values, len(output_ids)), kind)
            values, live.states = contract.split(
                predict.own(self, live.inputs, output_ids, live.states)
            )
            return self._prediction(values, contract.rtype, live.inputs, output_ids, live.states)

    def _prediction(
        self, values: Any, kind: Rtype, inputs: Any, output_ids: torch.Tensor, states: Any
    ) -> _Prediction:
        """Check what `predict` returned, and let repeated tokens become less likely."""
        values = _checked_values(values, len(output_ids))
        settings = self._settings()
        if settings.greedy or settings.penalty == 1:
            return _Prediction(values, kind)
        past = _past_tokens(inputs, output_ids, states).to(values.device)
        size = values.shape[1]
        if past.numel() and not 0 <= int(past.min()) <= int(past.max()) < size:
            got = f"tokens from {int(past.min())} to {int(past.max())}"
            raise InputError(
                f"repetition_penalty: expected tokens of the vocabulary {size}, got {got}"
            )
        found = values.gather(1, past)
        found = torch.where(found < 0, found * settings.penalty, found / settings.penalty)
        return _Prediction(values.scatter(1, past, found), kind)

    def _settings(self) -> _Settings:
        """Return the settings of the search that runs, else the present ones."""
        return self._running or _Settings.of(self)

    def _extend(self, live: _Live, chosen: _Continuations) -> None:
        """Let the chosen continuations be the live hypotheses."""
        rows = len(live.tokens)
        # In the first step the rows are samples, and predict copies their states itself.
        live.parents = chosen.parents if self.step > 0 else None
        live.tokens = live.tokens[chosen.parents]
        live.append(chosen.tokens)
        live.scores = chosen.scores
        live.owner = live.owner[chosen.parents]
        # Inputs are the same for all hypotheses of a sample, so only their number matters.
        if len(chosen.parents) != rows or self.step == 0:
            self._take_inputs(live, chosen.parents)

    def _drop_finished_beams(
        self, live: _Live, beams: Ids, found: _Found, settings: _Settings
    ) -> None:
        keep = ~settings.finished(live.tokens)
        if not keep.all():
            first = _starts(live.owner)  # where the best hypothesis of each sample is
            done = first[~keep[first]]
            for row in done.tolist():
                found.add(int(live.owner[row]), live, row)
            keep &= ~np.isin(live.owner, live.owner[done])
            lost = np.bincount(live.owner[~keep], minlength=len(beams)) > 0
            beams[lost] = np.bincount(live.owner[keep], minlength=len(beams))[lost]
        self._keep(live, keep)

    def _drop_finished_sequences(self, live: _Live, found: _Found, settings: _Settings) -> None:
        keep = ~settings.finished(live.tokens)
        for row in np.flatnonzero(~keep).tolist():
            found.add(int(live.owner[row]), live, row)
        self._keep(live, keep)

    def _keep(self, live: _Live, keep: Bools) -> None:
        self.flag = self._tensor(keep)
        if not keep.all():
            self._take(live, np.flatnonzero(keep))

    def _take(self, live: _Live, rows: Ids) -> None:
        live.take(rows)
        self._take_inputs(live, rows)

    def _take_inputs(self, live: _Live, rows: Ids) -> None:
        index = torch.from_numpy(rows)
        live.inputs = [tensor[index.to(tensor.device)] for tensor in live.inputs]
        if self.use_batch:
            self.input_seqlen = self.input_seqlen[index.to(self.input_seqlen.device)]

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.tensor(array, device=self.device)  # a copy: predict may change it

    def _set_first_output_ids(self) -> None:
        bos = [] if self.bos_token_id is None else [_integer("bos_token_id", self.bos_token_id, 0)]
        self.first_output_ids = torch.tensor([bos], dtype=torch.long, device=self.device)

    # --- inputs -----------------------------------------------------------------------------------

    def _to_tensors(self, inputs: Any) -> list[torch.Tensor]:
        """Return inputs as tensors [samples, ...], and note how long they are."""
        if isinstance(inputs, torch.Tensor):
            if inputs.ndim < 2:
                got = f"{inputs.ndim} dimensions"
                raise InputError(f"inputs: expected a tensor [samples, length], got {got}")
            self._note_lengths([inputs.shape[1]] * len(inputs))
            return [inputs.to(self.device)]
        if not isinstance(inputs, Sequence | np.ndarray) or isinstance(inputs, str | bytes):
            raise TypeError(f"inputs: expected a list or a tensor, got {type(inputs).__name__}")
        if len(inputs) == 0:
            raise InputError("inputs: expected at least one, got none")
        entries = [inputs] if all(_is_integer(entry) for entry in inputs) else inputs
        return [self._to_tensor(f"inputs[{i}]", entry) for i, entry in enumerate(entries)]

    def _to_tensor(self, name: str, entry: Any) -> torch.Tensor:
        if isinstance(entry, torch.Tensor):
            if entry.ndim == 0:
                raise InputError(f"{name}: expected a tensor [samples, ...], got a number")
            self._note_lengths([0] * len(entry))
            return entry
        if not isinstance(entry, Sequence | np.ndarray) or isinstance(entry, str | bytes):
            raise TypeError(f"{name}: expected token ids or a tensor, got {type(entry).__name__}")
        samples = [
            _token_vector(f"{name}[{i}]" if self.use_batch else name, tokens, self.use_batch)
            for i, tokens in enumerate(entry if self.use_batch else [entry])
        ]
        width = max((len(tokens) for tokens in samples), default=0)
        left = self.padding_side == "left"
        self._note_lengths([width if left else len(tokens) for tokens in samples])
        padded = np.full((len(samples), width), self.pad_token_id, np.int64)
        for row, tokens in zip(padded, samples, strict=True):
            row[width - len(tokens) if left else 0 :][: len(tokens)] = tokens
        return torch.from_numpy(padded).to(self.device)

    def _note_lengths(self, lengths: Sequence[int]) -> None:
        self.input_seqlen = torch.tensor(lengths, dtype=torch.long, device=self.device)


# --- settings -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a search reads of the attributes of a decoder, checked."""

    greedy: bool
    top_k: int | None
    top_p: float | None
    temperature: float
    penalty: float
    min_new_tokens: int
    min_ends: int
    ends: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(decoder: AutoRegressiveDecoder) -> _Settings:
        _integer("n", decoder.n, 1)
        _integer("pad_token_id", decoder.pad_token_id)
        for name in ("max_new_tokens", "max_length"):
            if getattr(decoder, name) is not None:
                _integer(name, getattr(decoder, name), 0)
        if decoder.padding_side not in ("left", "right"):
            raise InputError(
                f"padding_side: expected 'left' or 'right', got {decoder.padding_side!r}"
            )
        temperature = _number("temperature", decoder.temperature, 0, math.inf)
        penalty = _number("repetition_penalty", decoder.repetition_penalty, 0, math.inf)
        if penalty == 0:
            raise InputError("repetition_penalty: expected a number above 0, got 0")
        top_k = decoder.top_k
        top_p = None if decoder.top_p is None else _number("top_p", decoder.top_p, 0, 1)
        return _Settings(
            greedy=not decoder.do_sample or temperature == 0,
            top_k=None if top_k is None else _integer("top_k", top_k, 1),
            top_p=None if top_p == 1 else top_p,
            temperature=temperature,
            penalty=penalty,
            min_new_tokens=_integer("min_new_tokens", decoder.min_new_tokens, 0),
            min_ends=_integer("min_ends", decoder.min_ends, 1),
            ends=_end_sequences(decoder.eos_token_id),
        )

    def finished(self, tokens: Ids) -> Bools:
        """Mark the rows of tokens [rows, length] that end with an end and have enough of them."""
        length = tokens.shape[1]
        if length < self.min_new_tokens:
            return np.zeros(len(tokens), np.bool_)
        finished = self._stops(tokens, length)
        if self.min_ends > 1 and finished.any():
            counts = sum(self._stops(tokens, stop).astype(int) for stop in range(1, length + 1))
            finished &= counts >= self.min_ends
        return finished

    def _stops(self, tokens: Ids, length: int) -> Bools:
        """Mark the rows that have an end right before column `length`."""
        stops: Bools = np.zeros(len(tokens), np.bool_)
        for end in self.ends:
            if len(end) == 1:
                stops |= tokens[:, length - 1] == end[0]
            elif len(end) <= length:
                stops |= (tokens[:, length - len(end) : length] == end).all(axis=1)
        return stops


def _end_sequences(value: Any) -> tuple[tuple[int, ...], ...]:
    """Return the ends that an `eos_token_id` means, each a sequence of tokens."""
    if not isinstance(value, list | tuple | set | frozenset):
        return ((_end_token(value),),)
    ends = []
    for entry in value:
        tokens = entry if isinstance(entry, list | tuple) else [entry]
        if len(tokens) == 0:
            raise InputError("eos_token_id: expected ends of at least one token, got an empty one")
        ends.append(tuple(_end_token(token) for token in tokens))
    return tuple(ends)


def _end_token(value: Any) -> int:
    whole = isinstance(value, float) and value.is_integer()
    if not whole and not _is_integer(value):
        raise TypeError(
            "eos_token_id: expected an integer or a list of integers and lists of them, "
            f"got {value!r} of type {type(value).__name__}"
        )
    return int(value)


def _is_integer(value: Any) -> bool:
    # A tensor of one element can be an index, too, but stands for an input.
    return hasattr(value, "__index__") and not isinstance(
        value, bool | np.bool_ | np.ndarray | torch.Tensor
    )


def _integer(name: str, value: Any, least: int | None = None) -> int:
    if not _is_integer(value):
        raise TypeError(f"{name}: expected an integer, got {value!r} of {type(value).__name__}")
    number = operator.index(value)
    if least is not None and number < least:
        raise InputError(f"{name}: expected at least {least}, got {number}")
    return number


def _number(name: str, value: Any, least: float, most: float) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    number = float(value)
    if not least <= number <= most or math.isinf(number):
        raise InputError(
            f"{name}: expected a number of at least {least}"
            f"{'' if math.isinf(most) else f' and at most {most}'}, got {number}"
        )
    return number


def _checked_rtype(name: str, value: Any) -> Rtype:
    if value not in _RTYPES:
        raise InputError(f"{name}: expected 'probas' or 'logits', got {value!r}")
    return cast("Rtype", value)


def _token_vector(name: str, tokens: Any, of_batch: bool) -> Ids:
    """Return one sequence of token ids."""
    array = np.asarray(tokens)
    if array.ndim != 1:
        hint = "give a list of token lists" if of_batch else "several need use_batch"
        raise InputError(
            f"{name}: expected the token ids of one sample, got {array.ndim} dimensions; {hint}"
        )
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {array.dtype}")
    return array.astype(np.int64)


# --- what predict returns -------------------------------------------------------------------------

# Of the method itself: logits or probabilities. Of one without wraps: logarithms of probabilities,
# or probabilities on which the settings have acted.
Kind = Literal["logits", "probas", "scores", "final"]


@dataclass(slots=True)
class _Contract:
    """What a decorated method returns."""

    rtype: Rtype
    use_states: bool

    def set_rtype(self, value: Rtype) -> None:
        self.rtype = _checked_rtype("default_rtype", value)

    def set_use_states(self, value: bool) -> None:
        self.use_states = bool(value)

    def split(self, returned: Any) -> tuple[Any, Any]:
        """Return scores and states."""
        return _pair(returned, "with use_states=True") if self.use_states else (returned, None)


def _pair(returned: Any, why: str) -> tuple[Any, Any]:
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        got = type(returned).__name__
        if isinstance(returned, tuple | list):
            got = f"{got} of {len(returned)}"
        raise TypeError(f"predict: expected a pair (scores, states) {why}, got {got}")
    return returned[0], returned[1]


@dataclass(frozen=True, slots=True)
class _Prediction:
    """Scores of the next tokens, [rows, V] on the device where `predict` left them."""

    values: torch.Tensor
    kind: Kind

    def take(self, rows: Ids) -> _Prediction:
        index = torch.from_numpy(rows).to(self.values.device)
        return _Prediction(self.values[index], self.kind)


def _checked_values(values: Any, rows: int) -> torch.Tensor:
    if not isinstance(values, torch.Tensor):
        hint = "; states need wraps(use_states=True)" if isinstance(values, tuple) else ""
        raise TypeError(f"predict: expected a tensor, got {type(values).__name__}{hint}")
    if values.ndim != 2 or len(values) != rows or values.shape[1] == 0:
        raise InputError(f"predict: expected shape [{rows}, V], got {list(values.shape)}")
    if not values.is_floating_point():
        raise TypeError(f"predict: expected floating point, got {values.dtype}")
    return values.detach()


def _past_tokens(inputs: Any, output_ids: torch.Tensor, states: Any) -> torch.Tensor:
    """Return the tokens [rows, length] that the repetition penalty is about."""
    if isinstance(states, dict) and states.get("past_token_ids") is not None:
        return cast("torch.Tensor", states["past_token_ids"])
    first = inputs[0]
    if first.ndim == 2 and not first.is_floating_point() and len(first) == len(output_ids):
        return torch.cat([first.to(output_ids.device), output_ids], 1)
    return output_ids


def _past_length(states: Any) -> int:
    """Return how many tokens a cache in the states holds."""
    past = states.get("past_key_values") if isinstance(states, dict) else None
    if past is None:
        return 0
    if hasattr(past, "get_seq_length"):
        return int(past.get_seq_length())
    return int(past[0][0].shape[2])


def _take_rows(past: Any, rows: torch.Tensor) -> Any:
    if isinstance(past, torch.Tensor):
        return past.index_select(0, rows.to(past.device))
    if isinstance(past, tuple | list):
        return type(past)(_take_rows(part, rows) for part in past)
    return past


def _probabilities(prediction: _Prediction, settings: _Settings) -> torch.Tensor:
    """Return probabilities [rows, V], float32, after temperature, top_k and top_p.

    Of logits they add up to 1; what is left out has probability 0. This is the definition that the
    selection below must meet without computing all of it.
    """
    x = prediction.values.float()
    of_logits = prediction.kind == "logits"
    if settings.greedy:
        return torch.softmax(x, dim=-1) if of_logits else x
    left_out = -math.inf if of_logits else 0.0
    if settings.temperature != 1:
        x = x / settings.temperature if of_logits else _tempered(x, settings.temperature)
    if settings.top_k is not None:
        least = x.topk(min(settings.top_k, x.shape[1])).values[:, -1:]
        x = x.masked_fill(x < least, left_out)
    if settings.top_p is not None:
        probas = torch.softmax(x, dim=-1) if of_logits else x / x.sum(dim=-1, keepdim=True)
        falling, order = probas.sort(dim=-1, descending=True, stable=True)
        outside = ~_nucleus(falling, settings.top_p)
        x = x.masked_fill(outside.scatter(1, order, outside), left_out)
    return torch.softmax(x, dim=-1) if of_logits else x


def _tempered(probas: torch.Tensor, temperature: float) -> torch.Tensor:
    powers = probas ** (1 / temperature)
    return powers / powers.sum(dim=-1, keepdim=True)


def _nucleus(falling: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mark the first of falling probabilities [rows, n] that together reach the share `top_p`."""
    falling = falling.double()
    inside = falling.cumsum(dim=-1) - falling < top_p - NUCLEUS_SLACK
    inside[:, 0] = True
    return inside


# --- selection ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Live:
    """The sequences that go on, one a row; rows of a sample are together, the best first.

    `owner` is the sample of a hypothesis, or the number of a drawn sequence. `parents` are the rows
    that `predict` had for the hypotheses which the last step chose; None after the first step.
    """

    inputs: list[torch.Tensor]
    tokens: Ids
    owner: Ids
    scores: Floats
    states: Any
    parents: Ids | None = None

    def append(self, tokens: Ids) -> None:
        self.tokens = np.concatenate([self.tokens, tokens[:, None]], axis=1)

    def take(self, rows: Ids) -> None:
        self.tokens, self.owner = self.tokens[rows], self.owner[rows]
        self.scores = self.scores[rows]


@dataclass(slots=True)
class _Found:
    """Results by their sample or number, in the order in which they were found."""

    sequences: dict[int, Ids] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)
    states: Any = None

    def add(self, number: int, live: _Live, row: int) -> None:
        self.sequences[number] = live.tokens[row]
        self.scores[number] = float(live.scores[row])


@dataclass(frozen=True, slots=True)
class _Continuations:
    """Tokens and the rows that they follow; samples in order, the best first."""

    scores: Floats
    tokens: Ids
    parents: Ids


def _best_continuations(
    prediction: _Prediction, live: _Live, beams: Ids, settings: _Settings
) -> _Continuations:
    """Choose the best ``beams[sample]`` continuations of each sample that is alive."""
    count = int(beams.max())
    candidates = _candidates(prediction, live.scores, count, settings)
    if candidates is None:
        candidates = _all_compared(prediction, live.scores, count, settings)
    totals, tokens = candidates[0].ravel(), candidates[1].ravel()
    rows = np.arange(len(live.owner)).repeat(candidates[1].shape[1])
    if tokens.min() < 0:
        valid = tokens >= 0
        totals, tokens, rows = totals[valid], tokens[valid], rows[valid]
    order = np.lexsort((rows, tokens, -totals, live.owner[rows]))
    owner = live.owner[rows[order]]
    starts = _starts(owner)
    if len(starts) < len(_starts(live.owner)):
        raise InputError("predict: expected a finite entry for each sample, got only -inf")
    rank = np.arange(len(owner)) - starts.repeat(np.diff(starts, append=len(owner)))
    chosen = order[rank < beams[owner]]
    return _Continuations(totals[chosen], tokens[chosen], rows[chosen])


def _starts(owner: Ids) -> Ids:
    """Return where each run of equal numbers begins."""
    begins: Bools = np.ones(len(owner), np.bool_)
    np.not_equal(owner[1:], owner[:-1], out=begins[1:])
    return np.flatnonzero(begins)


def _candidates(
    prediction: _Prediction, scores: Floats, count: int, settings: _Settings
) -> tuple[Floats, Ids] | None:
    """Return the best `count` continuations of each row from one pass for the largest entries.

    The order of the entries is that of the scores, but different entries may have equal scores, of
    which the lower token is the better. None where such a tie decides what belongs to the best.

    Returns
    -------
    totals, tokens
        float32 and int64 [rows, count]; None: see above.
    """
    found = _row_scores(prediction, count, settings)
    if found is None:
        return None
    totals: Floats = scores[:, None] + found.scores.astype(np.float32)
    # Probabilities of 0 are equal themselves, thus in order, and no entry is below them.
    if not (found.zero[:, :count] | (totals[:, :count] > totals[:, count:])).all():
        return None
    return totals[:, :count], found.tokens[:, :count]


@dataclass(frozen=True, slots=True)
class _RowScores:
    """Log-probabilities and tokens of the largest ``count + 1`` entries of each row.

    A token that is missing, -1, stands for all of probability 0. `zero` marks entries that are 0.
    """

    scores: NDArray[np.float64]
    tokens: Ids
    zero: Bools


def _row_scores(prediction: _Prediction, count: int, settings: _Settings) -> _RowScores | None:
    """Return the largest ``count + 1`` entries; None where `_all_compared` must choose them."""
    values = prediction.values
    if prediction.kind == "scores":
        scores, tokens = _largest(ops.topk, values, count + 1)
        return _RowScores(scores, tokens, np.zeros(tokens.shape, np.bool_))
    if prediction.kind == "logits" and settings.greedy:
        logs, tokens = _largest(ops.log_softmax_topk, values, count + 1)
        _check_rows("expected a finite entry in every row, got only -inf", tokens[:, 0] < 0)
        return _of_probabilities(np.exp(logs), tokens)
    if prediction.kind == "logits":
        return _truncated(values, count, settings)
    if not settings.greedy and (settings.temperature != 1 or settings.top_p is not None):
        values = _probabilities(prediction, settings)
    probas, tokens = _largest(ops.topk, values, count + 1)
    probas[tokens < 0] = 0
    _check_rows("expected probabilities of at least 0, got less", probas[:, -1] < 0)
    return _RowScores(np.log(probas + EPS), tokens, probas == 0)


def _of_probabilities(probas: NDArray[np.float64], tokens: Ids) -> _RowScores:
    return _RowScores(np.log(probas + EPS), tokens, np.zeros(tokens.shape, np.bool_))


def _truncated(logits: torch.Tensor, count: int, settings: _Settings) -> _RowScores | None:
    """Return `_row_scores` where the `top_k` likeliest tokens of a row share its probability."""
    assert settings.top_k is not None
    kept = settings.top_k
    values, tokens = _largest(ops.topk, logits, kept + 1)
    _check_rows("expected a finite entry in every row, got only -inf", tokens[:, 0] < 0)
    values /= settings.temperature
    tied = (values[:, kept - 1] == values[:, kept]) & (tokens[:, kept] >= 0)
    if tied.any():  # of equal logits all stay, and there may be more
        return None
    weights = np.exp(values - values[:, :1])
    weights[:, kept] = 0
    if settings.top_p is not None:
        falling = torch.from_numpy(weights / weights.sum(axis=1, keepdims=True))
        weights *= _nucleus(falling, settings.top_p).numpy()
    probas = weights / weights.sum(axis=1, keepdims=True)
    # A token that is left out stands for all of them, of which it need not be the lowest.
    tokens = np.where(weights > 0, tokens, -1)
    return _of_probabilities(probas[:, : count + 1], tokens[:, : count + 1])


def _all_compared(
    prediction: _Prediction, scores: Floats, count: int, settings: _Settings
) -> tuple[Floats, Ids]:
    """Return the best continuations of each row from the scores of all, [rows, <= count]."""
    if prediction.kind == "scores":
        logs = prediction.values.float()
    else:
        logs = torch.log(_probabilities(prediction, settings) + EPS)
    totals = torch.from_numpy(scores).to(logs.device)[:, None] + logs
    found, tokens = _largest(ops.topk, totals, min(count, totals.shape[1]))
    return found.astype(np.float32), tokens


def _largest(
    operation: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
    x: torch.Tensor,
    k: int,
) -> tuple[NDArray[np.float64], Ids]:
    """Return the results of a native operation on the host, float64 and int64 [rows, k]."""
    with _faults_of_predict():
        values, ids = operation(_native(x), k)
    found: NDArray[np.float64] = values.double().cpu().numpy()
    _check_rows("expected numbers below infinity, got inf", found[:, 0] == math.inf)
    return found, ids.long().cpu().numpy()


def _draw(
    prediction: _Prediction, settings: _Settings, seed: int, streams: Ids, position: int
) -> Ids:
    """Return a token for each row; what is drawn depends on seed, stream and position."""
    values = prediction.values
    if settings.greedy:
        tokens = _largest(ops.topk, values, 1)[1][:, 0]
        _check_rows("expected a finite entry in every row, got only -inf", tokens < 0)
        return tokens
    if prediction.kind != "logits":
        values = torch.log(values.float())
    own = {} if prediction.kind == "final" else _truncation(settings)
    with _faults_of_predict():
        drawn, _ = ops.sample(
            _native(values), end_id=0, seed=seed, streams=streams, positions=position, **own
        )
    result: Ids = drawn.long().cpu().numpy()
    return result


def _truncation(settings: _Settings) -> dict[str, Any]:
    top_p = 1.0 if settings.top_p is None else settings.top_p
    # A share of 0 keeps one token; the operation wants one above 0.
    return {
        "top_k": settings.top_k,
        "top_p": max(top_p, NUCLEUS_SLACK),
        "temperature": settings.temperature,
    }


def _native(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor that the kernels take: on their device, else on the host."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        x = x.float()
    if x.device.type != "cpu" and not has_kernels(x.device):
        x = x.cpu()
    return x if x.stride(-1) == 1 else x.contiguous()


@contextmanager
def _faults_of_predict() -> Iterator[None]:
    """Let messages about a row name the method that it came from."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"predict: {str(error).partition(': ')[2]}") from None


def _check_rows(message: str, faulty: Any) -> None:
    if faulty.any():
        raise InputError(f"predict: {message} in row {int(np.flatnonzero(faulty)[0])}")
