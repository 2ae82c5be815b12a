"""The whole model: one training step in three precisions, generation, masks, long inputs, backends."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from nemo_automodel.verify.check import Check
from nemo_automodel.verify.exact import Exact
from nemo_automodel.verify.outcome import (
    Difference,
    NotApplicable,
    Outcome,
    bitwise,
    formula,
    judge,
    rounding,
)
from nemo_automodel.verify.shrink import LENGTH
from nemo_automodel.verify.subject import Subject, step

GENERATED = 16


def training_step(subject: Subject) -> Outcome:
    """Logits, loss and the gradient of every parameter in fp32, beside the float64 truth."""
    truth = subject.truth.tensors()
    reference, ours = (step(model, subject.tokens()).tensors() for model in (subject.reference(), subject.ours()))
    if ours.keys() != truth.keys():
        return _one_sided(ours, truth)
    differences = [rounding(name, ours[name], reference[name], truth[name]) for name in truth]
    return judge(differences, f"logits, loss and {len(truth) - 2} gradients, beside the reference's own rounding")


def gradients_in_float64(subject: Subject) -> Outcome:
    """The backward pass as a formula: equal to ten digits."""
    with Exact():
        ours = step(subject.ours(torch.float64), subject.tokens()).tensors()
    truth = subject.truth.tensors()
    if ours.keys() != truth.keys():
        return _one_sided(ours, truth)
    return judge([formula(name, ours[name], truth[name]) for name in truth], f"{len(truth)} tensors in float64")


def _one_sided(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Outcome:
    return Outcome(False, f"gradients that are on one side only: {sorted(ours.keys() ^ truth.keys())[:4]}")


BF16_SAMPLES = 4
BF16_MARGIN = 1.25
"""How far from float64 the implementation's bf16 may be, in units of the reference's own distance.

Root mean squares over four samples, thousands of elements: two right orders of rounding scatter by a few percent at
these sizes (5 % at most over the families here); one rounding too many in a norm or in RoPE costs more than 30 %.
"""


def bf16_rounding(subject: Subject) -> Outcome:
    """The error of bf16 against float64, beside the reference's own: casts in the wrong place show here only."""
    reference, ours = subject.reference(torch.bfloat16), subject.ours(torch.bfloat16)
    truth_model = subject.reference(torch.bfloat16).double()  # the weights as bf16 rounds them
    squares = torch.zeros(2, 2, dtype=torch.float64)  # [logits or gradients, ours or the reference's]
    for seed in range(BF16_SAMPLES):
        ids = subject.tokens(batch=4, seed=seed + 1)
        with Exact():
            truth = step(truth_model, ids)
        for column, low in enumerate((step(ours, ids), step(reference, ids))):
            squares[0, column] += (low.logits.double() - truth.logits).square().sum().cpu()
            for name, gradient in truth.gradients.items():
                error = low.gradients[name].double() - gradient
                squares[1, column] += (error.square().sum() / gradient.square().sum().clamp(min=1e-30)).cpu()
    differences = [
        Difference(f"bf16 error of the {name}", own, BF16_MARGIN * low)
        for name, (own, low) in zip(("logits", "gradients"), squares.sqrt().tolist(), strict=True)
    ]
    worst = max(differences, key=lambda d: d.ratio)
    detail = (
        f"{worst.error / worst.bound * BF16_MARGIN:.2f} of the reference's own error (the {worst.name.split()[-1]})"
    )
    return judge(
        differences, detail, hint="where fp32 agrees, bf16 rounds more often: a cast is missing or in another place"
    )


def cached_decoding(subject: Subject) -> Outcome:
    """Token by token through the KV cache gives what the whole sequence gives; and so in pieces."""
    ids, model = subject.tokens(), subject.ours(torch.float64)
    with Exact(), torch.no_grad():
        whole = model(ids, use_cache=False).logits
        differences = []
        for name, cuts in {"token by token": [1] * LENGTH, "in pieces": [10, 1, LENGTH - 11]}.items():
            cache, logits = DynamicCache(config=model.config), []
            for piece in ids.split(cuts, dim=1):
                logits.append(model(piece, past_key_values=cache, use_cache=True).logits)
            if cache.get_seq_length() != LENGTH:
                return Outcome(
                    False, f"the cache holds {cache.get_seq_length()} of {LENGTH} positions: it is not filled"
                )
            differences.append(formula(name, torch.cat(logits, dim=1), whole))
    return judge(differences, "decoding with a cache, token by token and in pieces, against the whole sequence")


def greedy_tokens(subject: Subject) -> Outcome:
    """``generate`` gives the reference's tokens, from prompts of unequal length, and on past the original context."""
    reference, ours = subject.reference(), subject.ours()
    if not all(hasattr(model, "generate") for model in (reference, ours)):
        raise NotApplicable("the class has no generate(): inherit transformers' GenerationMixin for it")
    count, beside = 0, ""
    for length in (9, LENGTH):
        actual, expected = (
            _generated(ours, subject.tokens(length=length)),
            _generated(reference, subject.tokens(length=length)),
        )
        if wrong := (actual != expected).any(0).nonzero().flatten().tolist():
            # transformers 5.17 loses Phi-3's context where it makes the cache again
            if not torch.equal(actual, _generated(reference, subject.tokens(length=length), use_cache=False)):
                return Outcome(False, f"after {length} tokens, new ones part at number {wrong[0] + 1} of {GENERATED}")
            beside = " without its cache, with which it gives others"
        count += actual.numel()
    return Outcome(True, f"{count} greedy tokens equal the reference's{beside}")


def _generated(model: Any, ids: Tensor, use_cache: bool = True) -> Tensor:
    """What comes after ``ids``, the first row of which begins with padding."""
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    model.generation_config.pad_token_id = 0
    options = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED, "do_sample": False, "use_cache": use_cache}
    return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]


def padding(subject: Subject) -> Outcome:
    """Left and right padding: real positions give what the reference gives, and what the row gives alone."""
    ids, differences = subject.tokens(), []
    reference, ours = subject.reference(torch.float64), subject.ours(torch.float64)
    with Exact(), torch.no_grad():
        for side in ("left", "right"):
            mask = torch.ones_like(ids)
            mask[0, slice(7) if side == "left" else slice(LENGTH - 7, None)] = 0
            logits = [model(ids, attention_mask=mask, use_cache=False).logits for model in (reference, ours)]
            real = mask.bool()
            differences.append(formula(f"padded on the {side}", logits[1][real], logits[0][real]))
            if side == "right":
                alone = ours(ids[:1, : LENGTH - 7], use_cache=False).logits
                differences.append(formula("beside the row alone", logits[1][:1, : LENGTH - 7], alone))
    return judge(
        differences,
        "padded rows, left and right, equal the reference's",
        hint="where the modules agree, the attention mask is not honoured",
    )


def packed_documents(subject: Subject) -> Outcome:
    """Two documents in a row: each gives what it gives alone, and changing the first does not move the second."""
    ids, cut = subject.tokens(), 10
    at = torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)]).to(subject.device).expand(2, -1)
    changed = ids.clone()
    changed[:, :cut] = (changed[:, :cut] + 1) % subject.config.vocab_size
    differences = []
    with Exact(), torch.no_grad():
        for attn in ("eager", *(["sdpa"] if subject.takes("sdpa") else [])):
            model = subject.ours(torch.float64, attn)
            logits = model(ids, position_ids=at, use_cache=False).logits
            moved = model(changed, position_ids=at, use_cache=False).logits
            if torch.equal(moved[:, :cut], logits[:, :cut]):
                return Outcome(False, "changing the first document changes nothing at all")
            differences.append(bitwise(f"{attn}: second document, first one changed", moved[:, cut:], logits[:, cut:]))
            for name, part in {"first": slice(cut), "second": slice(cut, None)}.items():
                alone = model(ids[:, part], use_cache=False).logits
                differences.append(formula(f"{attn}: {name} document", logits[:, part], alone))
    return judge(differences, "documents packed in a row do not see each other", hint="packed documents see each other")


def long_inputs(subject: Subject) -> Outcome:
    """Beyond the original context length, where scaled RoPE changes, and back again."""
    reference, ours = subject.reference(torch.float64), subject.ours(torch.float64)
    differences = []
    with Exact(), torch.no_grad():
        for length in (LENGTH, 3 * LENGTH, LENGTH // 2):
            ids = subject.tokens(1, length, seed=length)
            logits = [model(ids, use_cache=False).logits for model in (reference, ours)]
            differences.append(formula(f"{length} tokens", logits[1], logits[0]))
    return judge(differences, f"{3 * LENGTH} tokens, past the original context, then short ones again")


def attention_backends(subject: Subject) -> Outcome:
    """Every implementation of attention that the class supports, padded and not, against the eager reference.

    With gradients, but for flex attention, which has no backward pass on the CPU.
    """
    backends = [attn for attn in ("sdpa", "flex_attention") if subject.takes(attn)]
    if not backends:
        raise NotApplicable("the class supports eager attention only")
    ids, mask = subject.tokens(), torch.ones_like(subject.tokens())
    mask[0, :7] = 0
    differences = []
    for padded, given in {"no padding": None, "padded": mask}.items():
        inputs: dict[str, Any] = {"attention_mask": given, "labels": ids if given is None else _labels(ids, mask)}
        real = slice(None) if given is None else mask.bool()
        with Exact():
            truth = step(subject.reference(torch.float64), ids, **inputs)
        expected = step(subject.reference(), ids, **inputs)
        for attn in backends:
            model = subject.ours(attn=attn)
            if attn == "flex_attention":
                # in plain operations: its compiler takes half a minute, and computes the same
                with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                    logits = model(ids, use_cache=False, **inputs).logits
            else:
                actual = step(model, ids, **inputs)
                logits, want, exact = actual.logits, expected.gradients, truth.gradients
                differences += [
                    rounding(f"{attn}, {padded}: grad {name}", gradient, want[name], exact[name])
                    for name, gradient in actual.gradients.items()
                ]
            differences.append(rounding(f"{attn}, {padded}", logits[real], expected.logits[real], truth.logits[real]))
    return judge(differences, f"{' and '.join(backends)}, padded and not, beside eager attention")


def _labels(ids: Tensor, mask: Tensor) -> Tensor:
    """No padding, nor the first token after it: of what sees nothing, each attention makes something else."""
    before = torch.cat((mask[:, :1], mask[:, :-1]), dim=1)
    return ids.masked_fill((mask == 0) | (before == 0), -100)


def gradient_checkpointing(subject: Subject) -> Outcome:
    """Recomputing the layers in the backward pass changes no bit, and does happen."""
    ids, plain = subject.tokens(), subject.ours()
    torch.manual_seed(0)  # a dropout draws the same twice
    expected = step(plain.train(), ids).tensors()
    model = subject.ours().train()
    model.gradient_checkpointing_enable()
    calls: list[int] = []
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0"))
    layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    actual = step(model, ids).tensors()
    if len(calls) < 2:
        return Outcome(False, "gradient_checkpointing_enable() changes nothing: a layer runs once")
    return judge([bitwise(k, actual[k], expected[k]) for k in expected], "recomputed layers give the same bits")


def compiled(subject: Subject) -> Outcome:
    """``torch.compile`` on each layer gives the same step."""
    ids, model = subject.tokens(), subject.ours(attn="sdpa" if subject.takes("sdpa") else "eager")
    torch._dynamo.reset()
    for name, layer in list(model.named_modules()):
        if name.rpartition(".")[2].isdigit() and "layers" in name:
            layer.compile()
    reference, truth = step(subject.reference(), ids).tensors(), subject.truth.tensors()
    actual = step(model, ids).tensors()
    torch._dynamo.reset()
    return judge([rounding(k, actual[k], reference[k], truth[k]) for k in truth], "each layer through torch.compile")


def labels_and_masks(subject: Subject) -> Outcome:
    """Loss and every gradient with labels of -100, a count of items, and padding (of padding tokens, left)."""
    ids, mask = subject.tokens(), torch.ones_like(subject.tokens())
    mask[0, :7] = 0
    padding_token = subject.config.pad_token_id
    padded = ids if padding_token is None else ids.masked_fill(mask == 0, max(padding_token, 0))
    some = ids.masked_fill(torch.arange(LENGTH, device=ids.device) % 3 == 1, -100)
    cases: dict[str, tuple[Tensor, dict[str, Any]]] = {
        "labels of -100": (ids, {"labels": some}),
        "num_items_in_batch": (ids, {"labels": some, "num_items_in_batch": 7}),
        "padding": (padded, {"labels": _labels(ids, mask), "attention_mask": mask}),
        "a bool mask": (padded, {"labels": _labels(ids, mask), "attention_mask": mask.bool()}),
    }
    if padding_token is not None:  # whether its row of the embedding learns
        cases["padding tokens without a mask"] = (padded, {"labels": ids})
    reference, ours = subject.reference(torch.float64), subject.ours(torch.float64)
    differences: list[Difference] = []
    with Exact():
        for name, (tokens, inputs) in cases.items():
            expected, actual = (step(model, tokens, **inputs).tensors() for model in (reference, ours))
            found = [formula(f"{name}: {key}", actual[key], expected[key]) for key in expected if key != "logits"]
            differences += found
            if not all(each.passed for each in found):
                break  # what is wrong there is wrong in the next cases, too
    return judge(differences, f"loss and gradients with {', '.join(cases)}")


def training_mode(subject: Subject) -> Outcome:
    """``train()`` changes nothing but dropout; and dropout acts where the reference's does."""
    ids = subject.tokens()
    rates = [name for name, value in vars(subject.config).items() if "drop" in name and isinstance(value, float | int)]
    with Exact():
        off: dict[str, Any] = dict.fromkeys(rates, 0.0)
        actual = step(subject.ours(torch.float64, **off).train(), ids).tensors()
        truth = step(subject.reference(torch.float64, **off), ids).tensors()
        differences = [formula(name, actual[name], truth[name]) for name in truth]
        for name in rates:
            acts = []
            for build in (subject.reference, subject.ours):
                rate: dict[str, Any] = {**off, name: 0.5}
                model = build(torch.float64, **rate).train()
                with torch.no_grad():
                    acts.append(not torch.equal(model(ids).logits, model(ids).logits))
            if acts[0] != acts[1]:
                word = "acts on the reference, and not here" if acts[0] else "acts here, and not on the reference"
                return Outcome(False, f"config.{name}=0.5 {word}", tuple(differences))
            nothing: dict[str, Any] = {**off, name: 1.0}  # drops all, so that chance has no part in it
            with torch.no_grad():
                want, have = (
                    build(torch.float64, **nothing).train()(ids).logits for build in (subject.reference, subject.ours)
                )
            differences.append(formula(f"logits with config.{name}=1", have, want))
    return judge(
        differences, f"train() as eval() without dropout; {', '.join(rates) or 'no rate in the config'} as there"
    )


def inputs_and_outputs(subject: Subject) -> Outcome:
    """Embeddings instead of tokens, and the last logits only."""
    ids, model, reference = subject.tokens(), subject.ours(torch.float64), subject.reference(torch.float64)
    with Exact(), torch.no_grad():
        whole = model(ids, use_cache=False).logits
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False).logits
        differences = [formula("inputs_embeds", embedded, whole)]
        given = reference.get_input_embeddings()(ids)  # whether a factor on them is in there shows on others' only
        expected, actual = (x(inputs_embeds=given, use_cache=False).logits for x in (reference, model))
        differences.append(formula("inputs_embeds, as the reference takes them", actual, expected))
        for count in (1, 3):
            last = model(ids, use_cache=False, logits_to_keep=count).logits
            differences.append(formula(f"logits_to_keep={count}", last, whole[:, -count:]))
    return judge(differences, "inputs_embeds and logits_to_keep")


CHECKS = [
    Check("end to end", "gradients in float64", gradients_in_float64),
    Check("end to end", "training step in fp32", training_step),
    Check("end to end", "labels and masks", labels_and_masks),
    Check("end to end", "training mode", training_mode),
    Check("end to end", "inputs and outputs", inputs_and_outputs),
    Check("end to end", "rounding in bf16", bf16_rounding),
    Check("end to end", "cached decoding", cached_decoding),
    Check("end to end", "greedy tokens", greedy_tokens),
    Check("end to end", "padding", padding),
    Check("end to end", "packed documents", packed_documents),
    Check("end to end", "long inputs", long_inputs),
    Check("end to end", "attention backends", attention_backends),
    Check("end to end", "gradient checkpointing", gradient_checkpointing),
    Check("end to end", "torch.compile", compiled, True),
]
