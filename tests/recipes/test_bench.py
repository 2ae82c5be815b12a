"""`automodel bench`: what a token costs beside torch's own count, parts and kinds, rows that fail, the report."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_automodel.cli import main
from nemo_automodel.config import ConfigError
from nemo_automodel.recipes import bench as bench_module
from nemo_automodel.recipes.bench import BenchOptions, bench, show
from nemo_automodel.recipes.bench_variant import PEERS, Request, measure, our_config
from nemo_automodel.recipes.flops import arithmetic
from nemo_automodel.recipes.step_parts import LOSS, PARTS, kind_of
from nemo_automodel.recipes.train import TrainingError
from nemo_automodel.recipes.workloads import WORKLOADS, Workload, documents_of_step, find_workload, mean_length

MISTRAL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "max_position_embeddings": 64,
}


def request_of(folder: Path, workload: Workload = WORKLOADS["tiny_lora"], **changes: Any) -> Request:
    workload.write_config(folder)
    options = {"variant": "ours", "folder": str(folder), "lora": workload.lora, "rows": 2, "length": 16}
    return Request(**{**options, "steps": 2, "warmup": 1, "profile": False, "device": "cpu", **changes})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama8b_lora", 4 * (32 * (4096 * 128 * 80 + 3 * 4096 * 14336) + 128256 * 4096) + 3.5 * 32 * 2 * 4096 * 4096),
        ("qwen7b_lora", 4 * (28 * (3584 * 128 * 64 + 3 * 3584 * 18944) + 152064 * 3584) + 3.5 * 28 * 2 * 3584 * 4096),
        ("llama1b_full", 6 * (16 * (2048 * 64 * 80 + 3 * 2048 * 8192) + 128256 * 2048) + 3.5 * 16 * 2 * 2048 * 4096),
        ("llama3b_full", 6 * (28 * (3072 * 128 * 64 + 3 * 3072 * 8192) + 128256 * 3072) + 3.5 * 28 * 2 * 3072 * 4096),
    ],
)
def test_arithmetic_by_hand(name: str, expected: float, tmp_path: Path) -> None:
    workload = WORKLOADS[name]
    workload.write_config(tmp_path)
    assert arithmetic(str(tmp_path), 4096).per_token(workload.lora is None) == expected


def test_arithmetic_counts_what_torch_counts(tmp_path: Path) -> None:
    """Eager attention computes the whole square, twice what counts, and 2 (not 2.5) times that backward."""
    WORKLOADS["tiny_full"].write_config(tmp_path)
    rows, length = 3, 32
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), attn_implementation="eager")
    ids = torch.randint(0, 512, (rows, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    rope = sum(sum(kinds.values()) for name, kinds in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
    cost = arithmetic(str(tmp_path), length)
    assert (counter.get_total_flops() - rope) / (rows * length) == 6 * cost.weights + 3 * 2 * cost.attention


def test_arithmetic_of_sliding_windows_and_of_transformers_own_classes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    assert arithmetic(str(tmp_path), 32).attention == 2 * 4 * 64 * (8 - 8 * 8 / 64)
    assert arithmetic(str(tmp_path), 8).attention == 2 * 4 * 64 * 4
    own = {**MISTRAL, "model_type": "gpt_bigcode", "architectures": ["GPTBigCodeForCausalLM"], "n_embd": 32}
    own |= {"n_head": 4, "n_layer": 2, "n_inner": 40, "multi_query": False}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in own.items() if k != "head_dim"}))
    cost = arithmetic(str(tmp_path), 32)
    assert cost.weights == 2 * (4 * 32 * 32 + 2 * 32 * 40) + 61 * 32


@pytest.mark.parametrize("variant", ["ours", "hf"])
@pytest.mark.parametrize("name", ["tiny_lora", "tiny_full"])
def test_a_variant_is_measured(name: str, variant: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    backward = torch.autograd.backward
    row = measure(request_of(tmp_path, WORKLOADS[name], variant=variant, profile=True))
    assert torch.autograd.backward is backward
    assert row["tokens_per_second"] == pytest.approx(1000 * 2 * 16 / row["step_ms"])
    assert len(row["steps_ms"]) == 2
    assert row["loss_first"] == pytest.approx(6.24, abs=0.1)
    assert set(row["parts_ms"]) == set(PARTS)
    assert all(row["parts_ms"][part] > 0 for part in PARTS)
    assert {"matrix products", "attention", "loss", "optimizer"} <= set(row["kernels"]["kinds"])


def test_documents_are_packed_or_padded(tmp_path: Path) -> None:
    """The same ones, whose tokens alone count: the loss of a step is the same."""
    workload = WORKLOADS["tiny_packed"]
    rows = documents_of_step(2, 64, 0)
    assert all(len(row) > 1 and 32 < sum(row) <= 64 for row in rows)
    assert rows == documents_of_step(2, 64, 0) != documents_of_step(2, 64, 1)
    assert 2 < mean_length(2, 64, 1) <= 64
    found = []
    for words in ((), ("data.packing=false",), ("train.micro_batch_size=1",)):
        row = measure(request_of(tmp_path, workload, documents=True, length=64, overrides=words))
        found.append(row["loss_first"])
        tokens = [sum(map(sum, documents_of_step(2, 64, step))) for step in (1, 2)]
        each = [ms / count for ms, count in zip(row["steps_ms"], tokens, strict=True)]
        assert row["tokens_per_second"] == pytest.approx(1e3 / (sum(each) / 2))
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)
    with pytest.raises(ConfigError, match="would change nothing here"):
        our_config(request_of(tmp_path, overrides=("data.packing=false",)))
    with pytest.raises(ValueError, match="only ours trains on"):
        bench(workload, BenchOptions(peers=("hf",), device="cpu"))


def test_overrides_reach_the_step(tmp_path: Path) -> None:
    """One row at a time: the same loss, and twice the passes (seen by the head's part, which stays a part)."""
    plain = measure(request_of(tmp_path))
    halved = measure(request_of(tmp_path, overrides=("train.micro_batch_size=1", "backend.rms_norm=torch_fp32")))
    assert halved["loss_first"] == pytest.approx(plain["loss_first"], rel=1e-5)
    assert halved["parts_ms"][LOSS] > 0
    config = our_config(request_of(tmp_path, overrides=("backend.attn=flex", "lora.r=4", "optim.beta1=0.8")))
    assert (config.model.backend.attn, config.lora and config.lora.r, config.optim.beta1) == ("flex", 4, 0.8)
    assert config.lora is not None
    assert config.lora.alpha == 32


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=3", "would change nothing"),
        ("backend.at=x", "did you mean model.backend.attn"),
        ("optim.lr=-1", "must be above 0"),
    ],
)
def test_bad_overrides(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        our_config(request_of(tmp_path, overrides=(override,)))


def test_the_command_ends_well_though_a_peer_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_module, "find_spec", lambda name: None if name == "liger_kernel" else True)
    file = tmp_path / "made" / "bench.json"
    words = ["bench", "tiny_full", "--rows", "1", "--length", "16", "--steps", "2", "--warmup", "1", "--device", "cpu"]
    assert main([*words, "--peers", "hf,hf_liger", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "hf_liger failed: liger-kernel is not installed: pip install liger-kernel" in out
    assert "k is 2 forward" in out
    here = "attention: sdpa (rows are not packed); norms, gated MLP, RoPE, loss: torch (no GPU)"
    assert f"ours is served by: {here}" in out
    report = json.loads(file.read_text())
    ours, hf, liger = report["rows"]
    assert set(liger) == {"name", "variant", "overrides", "error"}
    assert "served" not in hf
    assert ours["served"]["attention"] == "sdpa (rows are not packed)"
    assert hf["ratio"] == 1.0
    assert ours["ratio"] == ours["tokens_per_second"] / hf["tokens_per_second"]
    per_token = report["flops"]["per_token"]
    assert ours["tflops"] == pytest.approx(ours["tokens_per_second"] * per_token / 1e12)
    assert report["matmul_tflops"] == max(ours["matmul_tflops"], hf["matmul_tflops"])
    assert ours["share_of_peak"] == ours["tflops"] / report["matmul_tflops"]
    assert set(report) == {"workload", "device", "versions", "flops", "matmul_tflops", "rows", "notes"}


def stand_in(text: str) -> Callable[..., Any]:
    """A way to run another program instead of a variant's."""
    start = bench_module.subprocess.Popen
    return lambda command, **options: start([sys.executable, "-c", text, *command[3:]], **options)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; print('no memory'); sys.exit(9)", "the process ended with status 9: no memory"),
        ("import sys; open(sys.argv[1], 'w').write('{\"error\": \"E: all\\\\nof it\"}')", "E: all"),
    ],
)
def test_a_process_that_dies_is_a_row(
    program: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_module.subprocess, "Popen", stand_in(program))
    report = bench(WORKLOADS["tiny_full"], BenchOptions(device="cpu", peers=["hf"]))
    show(report)
    assert [row["error"].splitlines()[0] for row in report["rows"]] == [message, message]
    assert f"ours failed: {message}" in capsys.readouterr().out


def test_beside_a_gpu_the_next_process_is_started_ahead_and_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = "import sys; text = sys.stdin.read(); open(sys.argv[1], 'w').write(text)"
    begun: list[Any] = []
    start = stand_in(wait)
    monkeypatch.setattr(bench_module.subprocess, "Popen", lambda *a, **o: begun.append(start(*a, **o)) or begun[-1])
    monkeypatch.setattr(bench_module, "_cores", lambda: 4)
    requests = [request_of(tmp_path, overrides=(f"optim.lr={lr}",)) for lr in (1, 2)]
    with bench_module._Processes(tmp_path, 3, torch.device("cuda")) as processes:
        for number, request in enumerate(requests, 1):
            assert processes.measure(request)["overrides"] == list(request.overrides)
            assert len(begun) == number + 1
            assert begun[number - 1].returncode == 0
            assert begun[number].poll() is None
    assert [process.returncode for process in begun] == [0, 0, -9]


def test_an_interrupted_measurement_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    kind, start = subprocess.Popen, stand_in("import time; time.sleep(60)")
    monkeypatch.setattr(bench_module.subprocess, "Popen", lambda *a, **o: begun.append(start(*a, **o)) or begun[-1])
    monkeypatch.setattr(bench_module, "_cores", lambda: 4)

    def measured() -> None:
        """As the command line makes it of SIGTERM, while it waits."""
        with (
            bench_module._Processes(tmp_path, 3, torch.device("cuda")) as processes,
            monkeypatch.context() as interrupted,
        ):
            interrupted.setattr(kind, "communicate", lambda *_: sys.exit(143))
            processes.measure(request_of(tmp_path))

    with pytest.raises(SystemExit):
        measured()
    assert [process.returncode for process in begun] == [-9, -9]


def test_a_loss_that_is_no_number_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises((FloatingPointError, TrainingError), match="nan"):
        measure(request_of(tmp_path, overrides=("optim.lr=1e30", "optim.max_grad_norm=null")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny_ful"], "did you mean tiny_full? workloads are llama8b_lora"),
        (["."], "neither a workload nor a folder with a config.json"),
        (["tiny_full", "--rows", "0"], "--rows 0 is too few"),
        (["tiny_full", "--length", "500"], "more than the 256 positions"),
        (["tiny_full", "--peers", "hf,megatron"], "'megatron': there are hf, hf_liger, hf_compile"),
        (["tiny_full", "--steps", "0"], "at least 1"),
        (["tiny_full", "--variant", "flex"], "'flex' is no key=value"),
        (["tiny_full", "--device", "gpu0"], "device 'gpu0' is not usable here"),
    ],
)
def test_bad_input_is_one_message(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="llama8b_lora is for a GPU, and CUDA finds none here; try tiny_lora"):
        bench(WORKLOADS["llama8b_lora"], BenchOptions())


def test_a_folder_is_a_workload(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    with pytest.raises(ValueError, match="say --lora or --full"):
        find_workload(str(tmp_path))
    workload = find_workload(str(tmp_path), lora=True, rows=3)
    assert (workload.lora, workload.rows, workload.length, workload.gpu_only) == (16, 3, 64, False)
    assert find_workload("llama8b_lora", lora=False).lora is None


def load_convergence(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/convergence.py, as small as can be."""
    spec = spec_from_file_location("convergence", Path(__file__).parents[2] / "benchmarks" / "convergence.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "convergence", module)  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TINY", replace(module.TINY, hidden=32, rows=2, length=32))
    return module


@pytest.mark.slow
def test_convergence_tells_a_variant_that_learns_from_one_that_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    convergence = load_convergence(monkeypatch)
    words = ["--tiny", "--device", "cpu", "--steps", "10"]
    assert convergence.main([*words, "--variant", "model.dtype=float32", "--json", str(tmp_path / "curves.json")]) == 0
    assert "within the seeds' noise" in capsys.readouterr().out
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert list(curves) == ["hf float32 eager", "hf bfloat16", "ours", "ours model.dtype=float32"]
    assert all(len(curve) == 10 and curve[-1] < curve[0] for pair in curves.values() for curve in pair)
    for ours, reference in zip(curves["ours model.dtype=float32"], curves["hf float32 eager"], strict=True):
        assert ours == pytest.approx(reference, rel=1e-4)  # one optimizer on the same gradients
    assert convergence.main([*words, "--variant", "optim.lr=3e-4"]) == 1
    assert "further than the seeds" in capsys.readouterr().out


@pytest.mark.slow
def test_convergence_of_adapters_on_weights_that_know_another_chain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    convergence, file = load_convergence(monkeypatch), tmp_path / "curves.json"
    words = ["--tiny", "--lora", "--device", "cpu", "--steps", "10", "--json", str(file)]
    convergence.main([*words, "--variant", "model.dtype=float32", "--variant", "lora.base_dtype=float8"])
    curves = json.loads(file.read_text())
    for exact, ours, float8 in zip(
        *(curves[name] for name in ("hf float32 eager", "ours model.dtype=float32", "ours lora.base_dtype=float8")),
        strict=True,
    ):
        assert ours == pytest.approx(exact, rel=1e-4)  # peft's adapters, from the same start
        assert float8 == pytest.approx(exact, rel=1e-2)
        assert float8 != exact


def test_the_chain_of_convergence_is_of_order_two(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = load_convergence(monkeypatch).Chain(16, groups=2)
    ids = chain.batch(64, 128, 7)
    assert torch.equal(ids, chain.batch(64, 128, 7))
    assert not torch.equal(ids, chain.batch(64, 128, 8))
    allowed = chain.following[ids[:, :-2] % 2, ids[:, 1:-1]]
    assert (allowed == ids[:, 2:, None]).any(-1).all()
    first = (allowed[..., 0] == ids[:, 2:]).float().mean().item()
    assert 0.5 < first < 0.7  # half, and where the same token stands twice among the four


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x256x64_warpgroupsize2x1x1", "matrix products"),
        (
            "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>",
            "matrix products",
        ),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_sm80", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("void at::native::multi_tensor_apply_kernel<TensorListMetadata<4>, FusedAdamMathFunctor<>>", "optimizer"),
        ("liger_cross_entropy_kernel", "loss"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<>", "loss"),
        ("_rms_norm_forward_kernel", "norms"),
        ("_triton_rope", "RoPE"),
        ("_swiglu_forward_kernel", "activation"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("triton_poi_fused_add_mul_silu_3", "compiled (Inductor)"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::elementwise_kernel<128, 4, gpu_kernel_impl<direct_copy_kernel_cuda>>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<c10::BFloat16>>", "elementwise"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp<c10::BFloat16, MeanOps<>>>", "reductions"),
        ("void at::native::indexSelectLargeIndex<>", "embedding and indexing"),
        ("_gated_backward_kernel", "activation"),
        ("_kernel", "other Triton kernels"),
        ("something_new", "other"),
    ],
)
def test_kinds_of_kernel(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_peers_are_those_of_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in [*PEERS, *WORKLOADS])
