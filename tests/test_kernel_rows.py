"""Columns of a CSV file of kernels: read where they are right, refused with their line where not."""

import numpy as np
import pytest

from clustersim.errors import ClustersimError
from clustersim.study import kernel_rows as kr
from clustersim.study.pack import read_csv


def table(tmp_path, text):
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    return read_csv(path)


def test_a_missing_column_is_named_with_the_nearest_there_is(tmp_path):
    rows = table(tmp_path, "gpu,num_token\nH100,3\n")
    with pytest.raises(ClustersimError, match=r'"num_tokens" is missing \(did you mean "num_token"\?\)'):
        kr.whole(rows, "num_tokens")


@pytest.mark.parametrize("wrong", ["-3", "0", "2.5", "many", "", "inf"])
def test_what_is_no_number_of_tokens_is_refused_with_the_line_it_stands_in(tmp_path, wrong):
    rows = table(tmp_path, f"gpu,m\nH100,1\nH100,{wrong}\nH100,4\n")
    with pytest.raises(ClustersimError, match=r"^line 3: m = "):
        kr.whole(rows, "m")


def test_only_the_rows_asked_for_are_checked_and_lines_stay_those_of_the_file(tmp_path):
    rows = table(tmp_path, "gpu,m\nH100,-1\nH100,2\nH100,-4\n")
    assert kr.whole(rows, "m", np.array([1])).tolist() == [2.0]
    with pytest.raises(ClustersimError, match=r"^line 4: m = -4"):
        kr.whole(rows, "m", np.array([1, 2]))


def test_further_wrong_rows_are_counted(tmp_path):
    rows = table(tmp_path, "m\n1\n-1\n-2\n-3\n")
    with pytest.raises(ClustersimError, match=r"^line 3: .*\(and 2 more\)$"):
        kr.positive(rows, "m")


def test_a_gpu_nobody_knows_is_told_with_its_line_and_the_nearest_name(tmp_path):
    rows = table(tmp_path, "gpu,m\nH100-SXM-80GB,1\nH10,1\n")
    with pytest.raises(ClustersimError, match=r'^line 3: gpu = H10 is no GPU: .*did you mean "H[12]00"'):
        kr.gpus(rows)


def test_a_gpu_goes_by_any_of_its_names():
    names = np.array(["H100-SXM-80GB", "H100", "h100_sxm", " h100 "])
    assert set(kr.gpus({"gpu": names}).tolist()) == {"h100_sxm"}


def test_an_unknown_dtype_is_told_with_its_line(tmp_path):
    rows = table(tmp_path, "dtype,m\nbfloat16,1\nint7,1\n")
    with pytest.raises(ClustersimError, match=r"^line 3: dtype = int7 is no known dtype"):
        kr.formats(rows)


def test_half_precision_counts_as_bf16():
    assert kr.formats({"dtype": np.array(["float16", "bfloat16", "NVFP4"])}).tolist() == [
        "bf16",
        "bf16",
        "fp4",
    ]


def test_measured_times_may_be_absent_or_have_gaps(tmp_path):
    rows = table(tmp_path, "m,time_us\n1,2.5\n2,\n")
    assert kr.seconds(rows) == pytest.approx([2.5e-6, float("nan")], nan_ok=True)
    assert np.isnan(kr.seconds({"m": np.array([1, 2, 3])})).tolist() == [True] * 3


def test_rows_taken_keep_their_place_in_the_file():
    one = np.array([1.0, 2.0, 3.0])
    text = np.array(["a", "b", "c"])
    rows = kr.Rows("f", "gemm", text, text, text, {"m": one}, one, np.arange(3), text)
    some = kr.taken(rows, one > 1)
    assert len(some) == 2
    assert some.row.tolist() == [1, 2]
    assert some.columns["m"].tolist() == [2.0, 3.0]
    assert some.library.tolist() == ["b", "c"]
