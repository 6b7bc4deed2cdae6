from __future__ import annotations

import re
import shutil
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    VLWholeSlideMicroscopyImageStorage,
)

from histill.slides.dicom_series import WHOLE_SLIDE_CLASS, read_dicom_file
from histill.slides.find import SLIDE_SUFFIXES, SlideFile, find_slides
from histill.slides.open import open_slide
from histill.slides.slide import SlideError

DICOM = "CMU-1-Small-Region_dicom"


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def ids(*inputs: Path) -> list[str]:
    return [slide.id for slide in find_slides(inputs)]


def write_dicom(path: Path, series: str, *, sop_class: str, syntax: str, defined: bool = True) -> None:
    """A DICOM header with the sequence before the series that also holds a SeriesInstanceUID."""
    other = Dataset()
    other.SeriesInstanceUID = "1.2.3.999"
    deeper = Dataset()
    deeper.SeriesInstanceUID = "1.2.3.998"
    deeper.is_undefined_length_sequence_item = not defined
    other.ReferencedInstanceSequence = Sequence([deeper])
    other["ReferencedInstanceSequence"].is_undefined_length = not defined
    other.is_undefined_length_sequence_item = not defined
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    data.file_meta.MediaStorageSOPClassUID = pydicom.uid.UID(sop_class)
    data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data.SOPClassUID = sop_class
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID
    data.PatientID = "nobody"
    data.add_new(0x00080041, "OB", b"1234") if syntax != ImplicitVRLittleEndian else None
    data.ReferencedSeriesSequence = Sequence([other, other])
    data["ReferencedSeriesSequence"].is_undefined_length = not defined
    data.SeriesInstanceUID = series
    data.Rows = 4
    data.save_as(path, enforce_file_format=True)


def test_ids_are_relative_paths_sorted(tmp_path: Path) -> None:
    touch(tmp_path, "b.svs", "a/x.ome.tif", "a/b/c.TIFF", "a-1.ndpi", "z.ome.tiff", "v.1.mrxs", "v.1/Slidedat.ini")
    touch(tmp_path, ".hidden/h.svs", "a/.h.svs", "notes.txt", "svs", "picture.png")
    found = find_slides([tmp_path])
    assert [slide.id for slide in found] == ["a-1", "a__b__c", "a__x", "b", "v.1", "z"]
    assert SlideFile("a__b__c", tmp_path / "a/b/c.TIFF") in found
    assert find_slides([str(tmp_path)]) == found  # type: ignore[list-item]


def test_every_suffix_is_found(tmp_path: Path) -> None:
    touch(tmp_path, *(f"s{number}{suffix}" for number, suffix in enumerate(SLIDE_SUFFIXES) if suffix != ".dcm"))
    assert len(find_slides([tmp_path])) == len(SLIDE_SUFFIXES) - 1


def test_files_and_folders_together_and_twice(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.svs", "in/deep/b.svs", "c.svs")
    (tmp_path / "link.svs").symlink_to(tmp_path / "c.svs")
    inputs = [tmp_path / "c.svs", tmp_path / "in", tmp_path / "in/a.svs", tmp_path / "link.svs"]
    assert ids(*inputs) == ["a", "c", "deep__b"]


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    touch(tmp_path, "deep/a.svs")
    (tmp_path / "deep/up").symlink_to(tmp_path)
    assert ids(tmp_path) == ["deep__a"]


@pytest.mark.parametrize(
    ("names", "inputs"),
    [
        (["a.svs", "a.ome.tif"], ["."]),
        (["a/b.svs", "a__b.svs"], ["."]),
        (["one/a.svs", "two/a.svs"], ["one", "two"]),
        (["one/a.svs", "two/a.tif"], ["one/a.svs", "two/a.tif"]),
    ],
)
def test_two_slides_with_one_id(tmp_path: Path, names: list[str], inputs: list[str]) -> None:
    touch(tmp_path, *names)
    with pytest.raises(SlideError, match="two slides have the id") as caught:
        find_slides([tmp_path / name for name in inputs])
    assert all(str(tmp_path / name) in str(caught.value) for name in names)


def test_missing_and_empty_and_other_files(tmp_path: Path) -> None:
    touch(tmp_path, "tumour-1.svs", "notes.txt", "empty/notes.txt")
    with pytest.raises(SlideError, match=r"(?s)does not exist.*did you mean tumour-1.svs"):
        find_slides([tmp_path / "tumor-1.svs"])
    with pytest.raises(SlideError, match=r"(?s)no slides were found.*empty.*\.svs, \.tif, .*\.dcm"):
        find_slides([tmp_path / "empty"])
    with pytest.raises(SlideError, match=r"(?s)not a slide by its name.*notes.txt.*\.svs"):
        find_slides([tmp_path / "notes.txt"])
    with pytest.raises(SlideError, match="no slides were found"):
        find_slides([])


def test_a_dicom_series_is_one_slide(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "slides" / DICOM
    files = sorted(source.iterdir())
    assert ids(source) == [DICOM]
    assert find_slides([files[2]]) == [SlideFile(DICOM, files[0])]
    assert ids(source, files[1]) == [DICOM]
    assert DICOM in ids(shared_data / "slides")
    assert open_slide(find_slides([source])[0].path).levels[0].width == 2220
    shutil.copytree(source, tmp_path / "case" / "slide 7")
    assert ids(tmp_path) == ["case__slide 7"]


def test_dicom_series_that_share_a_folder(tmp_path: Path) -> None:
    kind = {"sop_class": VLWholeSlideMicroscopyImageStorage, "syntax": ExplicitVRLittleEndian}
    for name, series in [("p", "1.2.3.1"), ("q", "1.2.3.2"), ("r", "1.2.3.1"), ("s", "1.2.3.2")]:
        write_dicom(tmp_path / f"{name}.dcm", series, **kind)
    assert find_slides([tmp_path]) == [SlideFile("p", tmp_path / "p.dcm"), SlideFile("q", tmp_path / "q.dcm")]
    assert find_slides([tmp_path / "s.dcm"]) == [SlideFile("q", tmp_path / "q.dcm")]
    write_dicom(tmp_path / "a.dcm", "1.2.3.7", sop_class=CTImageStorage, syntax=ExplicitVRLittleEndian)
    touch(tmp_path, "damaged.dcm")
    assert ids(tmp_path) == ["damaged", "p", "q"]


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("defined", [True, False])
def test_the_series_is_the_files_own(tmp_path: Path, syntax: str, defined: bool) -> None:
    path = tmp_path / "a.dcm"
    write_dicom(path, "1.2.3.1", sop_class=VLWholeSlideMicroscopyImageStorage, syntax=syntax, defined=defined)
    header = read_dicom_file(path)
    assert header is not None
    assert pydicom.dcmread(path).SeriesInstanceUID == header.series == "1.2.3.1"
    assert header.sop_class == WHOLE_SLIDE_CLASS == VLWholeSlideMicroscopyImageStorage
    whole = path.read_bytes()
    for length in (0, 100, 131, 140, 300, len(whole) // 2):
        path.write_bytes(whole[:length])
        assert read_dicom_file(path) in (None, header)


def test_series_of_real_files_and_of_forms_that_are_not_read(shared_data: Path, tmp_path: Path) -> None:
    for path in (shared_data / "slides" / DICOM).iterdir():
        reference, header = pydicom.dcmread(path, stop_before_pixels=True), read_dicom_file(path)
        assert header is not None
        assert (header.sop_class, header.series) == (reference.SOPClassUID, reference.SeriesInstanceUID)
    path = tmp_path / "deflated.dcm"
    write_dicom(path, "1.2.3.1", sop_class=VLWholeSlideMicroscopyImageStorage, syntax=DeflatedExplicitVRLittleEndian)
    assert read_dicom_file(path) is None


def test_a_folder_named_like_a_slide_is_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "case.svs/a.svs")
    assert ids(tmp_path) == ["case.svs__a"]
    monkeypatch.chdir(tmp_path)
    assert ids(Path("case.svs")) == ["a"]
    assert re.fullmatch(r"[^/]+", ids(Path())[0])
