"""DICOM headers written element by element, according to the standard."""

import pytest

from data_prep.dicom import name_series
from pathflip_jax.data.pixels.dicom_headers import Header, read_header

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"


@pytest.mark.parametrize("implicit", [False, True])
def test_a_header_is_read_past_the_sequences_before_it(write_dicom, tmp_path, implicit):
    path = write_dicom(tmp_path / "a.dcm", "1.2.3.4", "S19-1_A", implicit=implicit)
    assert read_header(path) == Header(WHOLE_SLIDE, "1.2.3.4", "S19-1_A")
    assert read_header(path).is_slide
    whole = path.read_bytes()
    for size in range(132, len(whole), 7):  # cut short anywhere: what is there, and no error
        path.write_bytes(whole[:size])
        header = read_header(path)
        assert header.series in ("", "1.2.3.4") and header.container in ("", "S19-1_A")
    path.write_bytes(whole[:100])
    assert read_header(path) is None
    assert not read_header(write_dicom(tmp_path / "ct.dcm", kind="1.2.840.10008.5.1.4.1.1.2")).is_slide


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"caseA/DCM_0.dcm": "1 G1", "caseB/DCM_0.dcm": "2 G2"}, {"caseA", "caseB"}),
        ({"caseA/DCM_0.dcm": "1 G1", "caseB/DCM_0.dcm": "1 G1"}, {"caseA", "caseB"}),  # one series, copied
        ({"caseA/DCM_0.dcm": "1 G1", "caseA/DCM_1.dcm": "1 G1"}, {"caseA"}),
        ({"SM_1/113fed92-2815-4d5d-80f6-2b6555cbb51d.dcm": "1 G1"}, {"SM_1"}),
        ({"SM_1.2.3/113fed92-2815-4d5d-80f6-2b6555cbb51d.dcm": "1 G1"}, {"G1"}),
        ({"SM_1.2.3/1.2.840.1": "1 "}, {"SM_1.2.3"}),  # nothing better
        ({"flat/S1.dcm": "1 G1", "flat/S2.dcm": "2 G2"}, {"S1", "S2"}),
        ({"flat/101.dcm": "1 G1", "flat/102.dcm": "2 G2"}, {"101", "102"}),
        ({"flat/DCM_0.dcm": "1 G1", "flat/DCM_1.dcm": "1 G1", "flat/DCM_2.dcm": "2 G2/b"}, {"G1", "G2_b"}),
        ({"flat/DCM_0.dcm": "1 G1", "flat/DCM_1.dcm": "2 G1"}, {"1", "2"}),  # two scans of one glass
    ],
)
def test_a_series_is_named_by_file_folder_or_container(tmp_path, files, expected):
    headers = {}
    for name, said in files.items():
        series, _, container = said.partition(" ")
        headers[tmp_path / name] = Header(WHOLE_SLIDE, series, container)
    assert set(name_series(headers).values()) == expected
