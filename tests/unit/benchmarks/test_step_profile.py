"""Where time goes: what the device recorded, by kind of work."""

from __future__ import annotations

import pytest

from kvsluice.benchmarks.step_profile import COPIES, CUDNN, IDLE, MATRIX, REST, Span, by_kind, own_kernels

OWN = {"attend_items": "step_attention.attend"}


def test_spans_add_up_by_kind_the_longest_first():
    spans = [
        Span("nvjet_tst_128x64_64x8_2x1_v_bz_TNT", 0.0, 4.0),
        Span("attend_items", 4.0, 5.0),
        Span("attend_items", 5.0, 6.5),
        Span("void at::native::elementwise_kernel<128, 4>", 6.5, 7.0),
    ]
    assert by_kind(spans, OWN) == {MATRIX: 4.0, "step_attention.attend": 2.5, REST: 0.5, IDLE: 0.0}
    assert list(by_kind(spans, OWN)) == [MATRIX, "step_attention.attend", REST, IDLE]


def test_nothing_ran_where_no_span_was_under_way():
    spans = [Span("a", 5.0, 6.0), Span("b", 0.0, 3.0), Span("c", 1.0, 2.0), Span("d", 2.5, 4.0)]
    assert by_kind(spans, {})[IDLE] == 1.0
    assert by_kind([], {}) == {IDLE: 0.0}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Memcpy HtoD (Pinned -> Device)", COPIES),
        ("Memset (Device)", COPIES),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", MATRIX),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>", MATRIX),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", MATRIX),
        ("cublasLt::splitKreduce_kernel<32, 16, int>", MATRIX),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", CUDNN),
        ("void at::native::reduce_kernel<512, 1>", REST),
    ],
)
def test_libraries_are_told_by_their_names(name, kind):
    assert by_kind([Span(name, 0.0, 1.0)], {})[kind] == 1.0


def test_every_compiled_kernel_of_the_project_has_a_kind():
    pytest.importorskip("triton")
    found = own_kernels()
    assert found["attend_items"] == "step_attention.attend"
    assert found["fetch_chunks"] == "hot_set"
    assert found["_add_rms_norm"] == "rms_norm"
