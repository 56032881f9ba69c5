"""The cost of masks is measured in every case, on few tokens."""

from qmix.evals.serving import mask_cost
from tests.support.models import TINY


def test_every_case_is_timed(capsys):
    assert mask_cost.main([str(TINY), "--requests", "2", "--tokens", "6", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(mask_cost.CASES)
    none, one, every, slow = (line.split("|")[2:4] for line in lines[2:])
    assert none[0].strip() == every[1].strip() == "-"
    assert all("(" in cell for cell in (*one, *slow))
    assert float(slow[0].split()[0]) >= 20


def test_a_model_that_is_none_is_one_error(capsys):
    assert mask_cost.main(["/nowhere"]) == 3
    assert "mask_cost:" in capsys.readouterr().err
