from corolla.host.text import nearest


def test_the_nearest_name_is_asked_for() -> None:
    assert nearest("florra", ["fedavg", "flora"]) == "did you mean 'flora'?"


def test_nothing_is_asked_where_no_name_is_near() -> None:
    assert nearest("zzz", ["fedavg", "flora"]) == ""
    assert nearest("flora", []) == ""


def test_the_cutoff_decides_what_is_near() -> None:
    assert nearest("fled", ["flora"], cutoff=0.5) == ""
    assert nearest("fled", ["flora"], cutoff=0.4) == "did you mean 'flora'?"
