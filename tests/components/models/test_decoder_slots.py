"""Other families fill the common decoder's slots in about ten lines, with no branch in it, and equal transformers."""

import copy
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import transformers

from nemo_automodel.components.layout import Interleaved, concatenated, reordered, stored_as
from nemo_automodel.components.models.common import CombinedProjectionStateDictAdapter, InterleavedRopeStateDictAdapter
from nemo_automodel.components.models.common.backend import initialize_norm_module
from nemo_automodel.components.models.common.combined_projection.combined_mlp import CombinedGateUpMLP, PlainMLP
from nemo_automodel.components.models.common.combined_projection.combined_qkv import head_dim_of
from nemo_automodel.components.models.common.decoder import DecoderForCausalLM
from nemo_automodel.components.models.common.norm import NormSpec
from nemo_automodel.components.models.common.rope import RopeSpec
from nemo_automodel.components.models.common.spec import DecoderSpec, NormSlots
from nemo_automodel.components.models.common.tp_plan import NotCut, tp_plan_of
from nemo_automodel.verify import Target, assert_verified
from tests.conftest import assert_near, assert_same_step, randomize, tiny, tokens, uncompiled

AFTER = {"after_attention": "post_attention_layernorm", "after_mlp": "post_feedforward_layernorm"}
POST = NormSlots(before_attention=None, before_mlp=None, **AFTER)
SANDWICH = NormSlots(before_mlp="pre_feedforward_layernorm", **AFTER)
GEMMA = {"norm": NormSpec(offset=1.0, fp32=True, initial=0.0), "embedding_multiplier_rounded": True}
COHERE = {"norm": NormSpec(kind="layer", fp32=True), "norms": NormSlots(before_mlp="input_layernorm"), "parallel": True}


def share_of(config):
    return config.rope_parameters.get("partial_rotary_factor", 1.0)


class PlainAdapter(CombinedProjectionStateDictAdapter):
    fuses_gate_up = False


class InterleavedAdapter(InterleavedRopeStateDictAdapter):
    partial = True


class NormsOfHeadsAdapter(InterleavedAdapter):
    def other_rows(self):
        channels = Interleaved(head_dim_of(self.config), head_dim_of(self.config))
        return reordered("q_norm", channels), reordered("k_norm", channels)


class ConcatenatedAdapter(CombinedProjectionStateDictAdapter):
    def gate_up_rows(self, fusion):
        return concatenated(fusion, "gate_up_proj")


class Phi3Adapter(ConcatenatedAdapter):
    def qkv_rows(self, fusion):
        return concatenated(fusion, "qkv_proj")


class GlmAdapter(InterleavedAdapter, ConcatenatedAdapter):
    pass


class HunYuanAdapter(CombinedProjectionStateDictAdapter):
    renames = (("q_norm", "query_layernorm"), ("k_norm", "key_layernorm"))


class GraniteHybridAdapter(CombinedProjectionStateDictAdapter):
    renames = (("mlp", "shared_mlp"), ("down_proj", "output_linear"))

    def gate_up_rows(self, fusion):
        return concatenated(fusion, "input_linear")


class Starcoder2Adapter(PlainAdapter):
    renames = (("up_proj", "c_fc"), ("down_proj", "c_proj"))


class GPTNeoXAdapter(PlainAdapter):
    renames = (
        ("model.norm", "model.final_layer_norm"),
        ("model.embed_tokens", "model.embed_in"),
        ("self_attn.o_proj", "self_attn.dense"),
        ("self_attn", "attention"),
        ("up_proj", "dense_h_to_4h"),
        ("down_proj", "dense_4h_to_h"),
        ("model", "gpt_neox"),
    )

    def qkv_rows(self, fusion):
        return stored_as(fusion, "query_key_value")


class Family(DecoderForCausalLM):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012
    slots: ClassVar[Any] = staticmethod(lambda config: {})

    @classmethod
    def decoder_spec(cls, config):
        layers = ("full_attention",) * config.num_hidden_layers
        bias = getattr(config, "attention_bias", False)
        plain = {
            "norm_eps": getattr(config, "rms_norm_eps", None),
            "layer_types": layers,
            "qkv_bias": bias,
            "o_bias": bias,
        }
        return DecoderSpec(**plain | cls.slots(config))


def family(name, slots, adapter=CombinedProjectionStateDictAdapter, **attributes):
    """A class of the common decoder for transformers' ``<name>Config``, its spec filled from ``slots(config)``."""
    head, config = f"{name}ForCausalLM", {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    members = {"config_class": getattr(transformers, config), "adapter_class": adapter, "slots": staticmethod(slots)}
    return type(head, (Family,), members | attributes)


def windows(config, **more):
    return {"layer_types": tuple(config.layer_types), "sliding_window": config.sliding_window, **more}


def everywhere(config, **more):
    kind = "sliding_attention" if config.sliding_window else "full_attention"
    return {"layer_types": (kind,) * config.num_hidden_layers, "sliding_window": config.sliding_window, **more}


def gemma(config, **more):
    return {"embedding_multiplier": config.hidden_size**0.5, **GEMMA, **more}


def gemma2(config, **more):
    mlp = partial(CombinedGateUpMLP, activation=config.hidden_activation)
    more |= {"attention_scale": config.query_pre_attn_scalar**-0.5, "logits_softcap": config.final_logit_softcapping}
    return windows(config, **gemma(config), norms=SANDWICH, mlp=mlp, **more)


def granite(config, **more):
    return {
        "attention_scale": config.attention_multiplier,
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logits_multiplier": 1 / config.logits_scaling,
        **more,
    }


def granite4(config):
    turns = (config.position_embedding_type == "rope",) * config.num_hidden_layers
    mlp = partial(CombinedGateUpMLP, bias=False, intermediate_size=config.shared_intermediate_size)
    return granite(config, rope=RopeSpec(layers=turns), mlp=mlp)


def cohere(config, **more):
    return {"norm_eps": config.layer_norm_eps, "logits_multiplier": config.logit_scale, **COHERE, **more}


def cohere2(config):
    sliding = tuple(kind == "sliding_attention" for kind in config.layer_types)
    return windows(config, **cohere(config, rope=RopeSpec(layers=sliding, fp32_rotation=True)))


def exaone4(config):
    sliding = tuple(kind == "sliding_attention" or not config.sliding_window for kind in config.layer_types)
    return windows(config, qk_norm="head", norms=POST, rope=RopeSpec(layers=sliding))


def ntk_alpha(config, **kwargs):
    dim, rope = head_dim_of(config), config.rope_parameters
    base = rope["rope_theta"] * rope["alpha"] ** (dim / (dim - 2))
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float) / dim), 1.0


def hunyuan(config):
    own = ntk_alpha if config.rope_parameters.get("alpha") else None
    return {"qk_norm": "head", "qk_norm_after_rope": True, "rope": RopeSpec(frequencies=own)}


def ministral3(config):
    rope = config.rope_parameters
    growth = (rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"])
    return everywhere(config, rope=RopeSpec(query_growth=growth))


def starcoder2(config):
    bias = {"qkv_bias": config.use_bias, "o_bias": config.use_bias, "mlp": partial(PlainMLP, bias=config.use_bias)}
    drop = {"residual_dropout": config.residual_dropout, "embedding_dropout": config.embedding_dropout}
    norm = {"norm_eps": config.norm_epsilon, "norm": NormSpec(kind="layer", bias=True)}
    return everywhere(config, **bias, **drop, **norm)


def nemotron(config):
    norm = NormSpec(kind="layer", bias=True, offset=1.0)
    return {"norm_eps": config.norm_eps, "norm": norm, "rope": RopeSpec(share=share_of(config)), "mlp": PlainMLP}


def gpt_neox(config):
    return {
        "norm_eps": config.layer_norm_eps,
        "norm": NormSpec(kind="layer", bias=True),
        "parallel": config.use_parallel_residual,
        "mlp": partial(PlainMLP, bias=True),
        "rope": RopeSpec(share=share_of(config)),
        "residual_dropout": config.hidden_dropout,
        "embedding_dropout": config.hidden_dropout,
    }


def glm(config, **more):
    return {"o_bias": False, "rope": RopeSpec(share=share_of(config)), **more}


def glm4(config):
    norms = NormSlots(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
    return glm(config, norms=norms)


def phi3(config):
    rope = RopeSpec(share=share_of(config))
    return everywhere(config, residual_dropout=config.resid_pdrop, rope=rope)


def seed_oss(config):
    return {"o_bias": config.attention_out_bias, "residual_dropout": config.residual_dropout}


def ernie(config):
    bias = {"qkv_bias": config.use_bias, "o_bias": config.use_bias}
    mlp = partial(CombinedGateUpMLP, bias=config.use_bias)
    return {**bias, "mlp": mlp, "attention_dropout": 0.0, "rope": RopeSpec(fp32_tables=True)}


def apertus(config):
    norms = NormSlots(before_attention="attention_layernorm", before_mlp="feedforward_layernorm")
    return {"qk_norm": "head", "norms": norms, "mlp": partial(PlainMLP, bias=False)}


OLMO = {"qk_norm": "full", "norm": NormSpec(fp32=True), "norms": POST, "rope": RopeSpec(fp32_tables=True)}
FAMILIES = {
    "qwen3": family("Qwen3", lambda c: windows(c, qk_norm="head")),
    "mistral": family("Mistral", everywhere),
    "ministral": family("Ministral", windows),
    "ministral3": family("Ministral3", ministral3),
    "gemma": family("Gemma", gemma),
    "gemma2": family("Gemma2", lambda c: gemma2(c, attention_softcap=c.attn_logit_softcapping), _supports_sdpa=False),
    "gemma3": family("Gemma3", lambda c: gemma2(c, qk_norm="head")),
    "phi3": family("Phi3", phi3, Phi3Adapter),
    "granite": family("Granite", granite),
    "granitemoehybrid": family("GraniteMoeHybrid", granite4, GraniteHybridAdapter),
    "olmo2": family("Olmo2", lambda c: OLMO),
    "olmo3": family("Olmo3", lambda c: windows(c, **OLMO)),
    "smollm3": family("SmolLM3", lambda c: windows(c, rope=RopeSpec(layers=tuple(map(bool, c.no_rope_layers))))),
    "glm": family("Glm", glm, GlmAdapter),
    "glm4": family("Glm4", glm4, GlmAdapter),
    "cohere": family("Cohere", lambda c: cohere(c, rope=RopeSpec(fp32_rotation=True)), InterleavedAdapter),
    "cohere, norms of heads": family(
        "Cohere", lambda c: cohere(c, qk_norm="per_head", rope=RopeSpec(fp32_rotation=True)), NormsOfHeadsAdapter
    ),
    "cohere2": family("Cohere2", cohere2, InterleavedAdapter),
    "exaone4": family("Exaone4", exaone4),
    "seed_oss": family("SeedOss", seed_oss),
    "hunyuan": family("HunYuanDenseV1", hunyuan, HunYuanAdapter),
    "starcoder2": family("Starcoder2", starcoder2, Starcoder2Adapter),
    "nemotron": family("Nemotron", nemotron, PlainAdapter),
    "apertus": family("Apertus", apertus, PlainAdapter),
    "ernie4_5": family("Ernie4_5", ernie, InterleavedAdapter),
    "arcee": family("Arcee", lambda c: {"mlp": PlainMLP}, PlainAdapter),
    "gpt_neox": family("GPTNeoX", gpt_neox, GPTNeoXAdapter),
}
KINDS = ["sliding_attention", "full_attention"]
SLIDING = {"use_sliding_window": True, "sliding_window": 3, "layer_types": KINDS}
WINDOWS = {"sliding_window": 3, "layer_types": KINDS}
MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2}
MULTIPLIERS |= {"logits_scaling": 5.0}
BIASES = {"attention_bias": True, "mlp_bias": True}
HYBRID = {
    "mamba_n_heads": 4,
    "num_local_experts": 0,
    "shared_intermediate_size": 36,
    "layer_types": ["attention"] * 2,
    **MULTIPLIERS,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
TWO_TABLES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
}


def turning(share, **more):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share, **more}}


LONG = {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [2.0, 4.0], "factor": 8.0}
CASES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 10},
    "qwen3: sliding, biases": {**SLIDING, "attention_bias": True, "head_dim": 8},
    "mistral": {"sliding_window": None},
    "mistral: sliding": {"sliding_window": 4},
    "ministral": {**WINDOWS, "head_dim": 8},
    "ministral3": {"head_dim": 8, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.9}},
    "gemma": {"head_dim": 10},
    "gemma2": {**WINDOWS, "head_dim": 8, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 0.5},
    "gemma3": {**WINDOWS, "head_dim": 8, "query_pre_attn_scalar": 5, "rope_parameters": TWO_TABLES}
    | {"final_logit_softcapping": 2.0},
    "phi3": {**turning(0.5), "pad_token_id": 0},
    "phi3: longrope, sliding": {**turning(0.5, **LONG), "pad_token_id": 0, "sliding_window": 4}
    | {"original_max_position_embeddings": 32},
    "granite": {**BIASES, **MULTIPLIERS},
    "granite: tied": {"tie_word_embeddings": True, **MULTIPLIERS},
    "granitemoehybrid": {**HYBRID, "position_embedding_type": "rope"},
    "granitemoehybrid: no RoPE": {**HYBRID, "position_embedding_type": "nope"},
    "olmo2": {},
    "olmo2: biases": {"attention_bias": True},
    "olmo3": {**WINDOWS, "rope_parameters": TWO_TABLES},
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": 0},
    "glm": {**turning(0.5), "head_dim": 8, "pad_token_id": 0},
    "glm4": {**turning(0.5), "head_dim": 8, "pad_token_id": 0},
    "cohere": {},
    "cohere2": WINDOWS,
    "exaone4": WINDOWS,
    "exaone4: RoPE everywhere": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "seed_oss": {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "hunyuan": {"head_dim": 8, "tie_word_embeddings": True},
    "hunyuan: NTK": {"head_dim": 8} | turning(1.0, rope_type="dynamic", alpha=50.0, factor=1.0),
    "starcoder2": {"sliding_window": 4},
    "nemotron": {**turning(0.5), "head_dim": 8, **BIASES},
    "apertus": {
        "hidden_act": "xielu",
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "ernie4_5": {"head_dim": 8, "use_bias": True},
    "cohere, norms of heads": {"use_qk_norm": True},
    "arcee": {},
    "arcee: biases": {**BIASES, "intermediate_size": 33},
    "gpt_neox": {**turning(0.25), "num_key_value_heads": 4, "use_parallel_residual": True},
    "gpt_neox: sequential": {**turning(0.25), "num_key_value_heads": 4, "use_parallel_residual": False},
}


def class_of(name):
    return FAMILIES[name.partition(":")[0]]


def build(name: str, attn: str = "sdpa"):
    own_class = class_of(name)
    config = tiny(own_class.config_class, attn if own_class._supports_sdpa else "eager", **CASES[name])
    before = copy.deepcopy(config)
    hf = randomize(getattr(transformers, own_class.__name__)(config)).eval()
    ours = own_class(before).eval()
    ours.load_state_dict(ours.state_dict_adapter.from_hf(hf.state_dict()))
    return hf, ours


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_parity(name, attn):
    hf, ours = build(name, attn)
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    assert_same_step(hf, ours, input_ids=ids, labels=ids)
    labels = ids.masked_fill(mask == 0, -100)
    assert_same_step(hf, ours, mask, input_ids=ids, attention_mask=mask, labels=labels)


@pytest.mark.parametrize("name", CASES)
def test_generation_saving_and_loading(name, tmp_path):
    hf, ours = build(name)
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(tokens(2, 6), **options), hf.generate(tokens(2, 6), **options))
    ours.save_pretrained(tmp_path)
    ids = tokens(1, 8)
    for model_class in (type(hf), type(ours)):
        # transformers 5.17 would take sdpa for Gemma 2, which leaves its softcap out
        loaded = model_class.from_pretrained(tmp_path, attn_implementation=hf.config._attn_implementation)
        assert_near(loaded(ids).logits, hf(ids).logits)


BF16 = {
    "gemma2": {"attn_logit_softcapping": 20.0},
    "gemma3": {},
    "olmo3": {},
    "ministral3": {},
    "nemotron": {"num_key_value_heads": 8},
    "apertus": {},
    "ernie4_5": {},
}


@pytest.mark.parametrize("name", BF16)
def test_rounding_in_bf16_and_every_module_in_float64(name):
    own_class = FAMILIES[name]
    assert_verified(Target.of(own_class, own_class.config_class(**BF16[name])))


def test_specs_that_contradict_themselves():
    with pytest.raises(ValueError, match="layer_types contains 'chunked_attention'"):
        DecoderSpec(norm_eps=1e-6, layer_types=("chunked_attention",))
    with pytest.raises(ValueError, match="sliding_window=None"):
        DecoderSpec(norm_eps=1e-6, layer_types=("sliding_attention",))
    plain = {"norm_eps": 1e-6, "layer_types": ("full_attention",)}
    with pytest.raises(ValueError, match="qk_norm='each'"):
        DecoderSpec(**plain, qk_norm="each")
    with pytest.raises(ValueError, match=r"rope.layers is for 2 layers, layer_types for 1"):
        DecoderSpec(**plain, rope=RopeSpec(layers=(True, False)))
    with pytest.raises(ValueError, match="only a layer norm has a bias"):
        NormSpec(bias=True)
    with pytest.raises(ValueError, match=r"norm\.kind='batch'"):
        NormSpec(kind="batch")
    with pytest.raises(TypeError, match="decoder_spec"):
        DecoderForCausalLM(tiny())


def test_norms_that_a_backend_does_not_have():
    for spec, dim in ((NormSpec(offset=0.5), 8), (NormSpec(kind="layer"), (2, 8)), (NormSpec(), (2, 8))):
        with pytest.raises(ValueError, match=r"backend.rms_norm='te' has no NormSpec\(.*use backend.rms_norm='torch'"):
            initialize_norm_module("te", spec, dim)
    assert initialize_norm_module("torch_fp32", NormSpec(kind="layer"), 8).fp32


@pytest.mark.parametrize("name", ["gemma", "nemotron", "cohere", "apertus", "gpt_neox"])
def test_what_norms_and_activations_start_from(name):
    own_class = class_of(name)
    config = tiny(own_class.config_class, **CASES[name])
    hf = getattr(transformers, own_class.__name__)(copy.deepcopy(config)).state_dict()
    with torch.device("meta"):
        late = own_class(copy.deepcopy(config))
    late.to_empty(device="cpu")
    for module in late.modules():
        late._init_weights(module)
    for ours in (own_class(copy.deepcopy(config)), late):
        started = {key: x for key, x in ours.state_dict_adapter.to_hf(ours.state_dict()).items() if key in hf}
        fixed = [key for key in started if "norm" in key or "act_fn" in key]
        assert len(fixed) > 2
        for key in fixed:
            assert torch.equal(started[key], hf[key]), key


def test_a_softcap_of_the_scores_in_flex_attention_and_refused_elsewhere():
    hf, ours = build("gemma2")
    ids = tokens(2, 9)
    expected = hf(ids).logits
    ours.set_attn_implementation("flex_attention")
    with torch.no_grad(), uncompiled("flex_attention"):
        assert_near(ours(ids).logits, expected)
    ours.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match=r"attention 'sdpa' has no softcap .*\(0.5\): use backend.attn='flex' or"):
        ours(ids)


def test_queries_grow_with_their_positions():
    hf, ours = build("ministral3")
    late = torch.arange(9)[None] + 40
    logits = ours(tokens(1, 9), position_ids=late).logits
    assert_near(logits, hf(tokens(1, 9), position_ids=late).logits)
    assert (logits - ours(tokens(1, 9)).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("phi3", {"resid_pdrop": 0.5}),
        ("starcoder2", {"residual_dropout": 0.5}),
        ("starcoder2", {"embedding_dropout": 0.5}),
        ("gpt_neox", {"hidden_dropout": 0.5}),
        ("seed_oss", {"residual_dropout": 0.5}),
    ],
)
def test_dropout_drops_what_transformers_drops(name, changes):
    own_class = class_of(name)
    config = tiny(own_class.config_class, "eager", **{**CASES[name], **changes})
    hf = randomize(getattr(transformers, own_class.__name__)(copy.deepcopy(config))).train()
    ours = own_class(config).train()
    ours.load_state_dict(ours.state_dict_adapter.from_hf(hf.state_dict()))
    losses = []
    for model in (hf, ours):  # the same draws, if the same tensors are dropped from in the same order
        torch.manual_seed(1)
        losses.append(model(tokens(2, 9)).logits)
    assert_near(losses[1], losses[0])
    assert (losses[1] - ours.eval()(tokens(2, 9)).logits).abs().max() > 0.01


def test_what_tensor_parallelism_has_no_plan_for():
    for name, message in {
        "apertus": r"model.layers.0.mlp.act_fn.alpha_p, of the activation",
        "cohere, norms of heads": r"model.layers.0.self_attn.q_norm.weight has a row for each head",
    }.items():
        with pytest.raises(NotCut, match=message):
            tp_plan_of(build(name)[1])
    assert tp_plan_of(build("gpt_neox")[1])["model.layers.*.mlp.up_proj"] == "colwise"
