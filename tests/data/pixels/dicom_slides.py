"""DICOM whole slide images for the tests, written element by element with pydicom."""

import io
from pathlib import Path

import imagecodecs
import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    generate_uid,
)

TILE = 64
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"


def _jpeg(tile: np.ndarray) -> bytes:
    with io.BytesIO() as out:
        Image.fromarray(tile).save(out, "JPEG", quality=90)
        return out.getvalue()


CODECS = {  # transfer syntax, photometric interpretation, encoder of a frame
    "none": (ExplicitVRLittleEndian, "RGB", np.ndarray.tobytes),
    "jpeg": (JPEGBaseline8Bit, "YBR_FULL_422", _jpeg),
    "jpeg2000": (
        JPEG2000Lossless,
        "YBR_RCT",
        lambda tile: imagecodecs.jpeg2k_encode(tile, codecformat="j2k", mct=True),
    ),
    "jpegls": (JPEGLSLossless, "RGB", imagecodecs.jpegls_encode),
    "htj2k": (HTJ2KLossless, "YBR_RCT", imagecodecs.htj2k_encode),
}


def _item(**values) -> Dataset:
    found = Dataset()
    for name, value in values.items():
        setattr(found, name, value)
    return found


def _tiles(image: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """Row, column and pixels of each tile, those of the border filled up with a dark colour, which is never shown."""
    rows, columns = -(-image.shape[0] // TILE), -(-image.shape[1] // TILE)
    filled = np.full((rows * TILE, columns * TILE, 3), 20, np.uint8)
    filled[: image.shape[0], : image.shape[1]] = image
    return [
        (y * TILE, x * TILE, np.ascontiguousarray(filled[y * TILE : y * TILE + TILE, x * TILE : x * TILE + TILE]))
        for y in range(rows)
        for x in range(columns)
    ]


def write_instance(path: Path, image: np.ndarray, codec: str = "none", sparse: bool = False, **values) -> Path:
    """One file, of a level or of a label; `values` replace elements, and None leaves one out."""
    syntax, photometric, encode = CODECS[codec]
    tiles = [tile for tile in _tiles(image) if not sparse or tile[2].min() < 255]
    mpp = values.pop("mpp", 0.5)
    profile = values.pop("profile", None)
    frames = values.pop("frames", slice(None))
    one = Dataset()
    one.file_meta = FileMetaDataset()
    one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = WHOLE_SLIDE
    one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = generate_uid()
    one.file_meta.TransferSyntaxUID = syntax
    one.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    one.Modality, one.PatientID, one.PatientName, one.StudyInstanceUID = "SM", "P1", "", "1.2.826.0.1.1"
    one.SeriesInstanceUID, one.FrameOfReferenceUID = "1.2.826.0.1.2", "1.2.826.0.1.3"
    one.AccessionNumber = one.StudyID = one.Manufacturer = ""
    one.PositionReferenceIndicator, one.ContainerIdentifier = "SLIDE_CORNER", "G1"
    one.SamplesPerPixel, one.PhotometricInterpretation, one.PlanarConfiguration = 3, photometric, 0
    one.Rows = one.Columns = TILE
    one.BitsAllocated = one.BitsStored = 8
    one.HighBit, one.PixelRepresentation = 7, 0
    one.TotalPixelMatrixRows, one.TotalPixelMatrixColumns = image.shape[:2]
    one.ImagedVolumeWidth, one.ImagedVolumeHeight = image.shape[1] * mpp / 1000, image.shape[0] * mpp / 1000
    one.ImagedVolumeDepth, one.FocusMethod, one.ExtendedDepthOfField = 1.0, "AUTO", "NO"
    one.SpecimenLabelInImage, one.BurnedInAnnotation, one.LossyImageCompression = "NO", "NO", "00"
    one.InstanceNumber, one.NumberOfOpticalPaths, one.TotalPixelMatrixFocalPlanes = 1, 1, 1
    one.VolumetricProperties = "VOLUME"
    one.ImageOrientationSlide = [0, -1, 0, -1, 0, 0]
    one.TotalPixelMatrixOriginSequence = [
        _item(XOffsetInSlideCoordinateSystem=20.0, YOffsetInSlideCoordinateSystem=40.0)
    ]
    lamp = _item(CodeValue="111744", CodingSchemeDesignator="DCM", CodeMeaning="Brightfield illumination")
    optics = _item(OpticalPathIdentifier="1", IlluminationTypeCodeSequence=[lamp], ObjectiveLensPower=20.0)
    if profile:
        optics.ICCProfile = profile
    one.OpticalPathSequence = [optics]
    measures = _item(PixelSpacing=[mpp / 1000] * 2, SliceThickness=0.001)
    shared = _item(PixelMeasuresSequence=[measures])
    shared.WholeSlideMicroscopyImageFrameTypeSequence = [_item(FrameType=one.ImageType)]
    shared.OpticalPathIdentificationSequence = [_item(OpticalPathIdentifier="1")]
    one.SharedFunctionalGroupsSequence = [shared]
    one.DimensionOrganizationType = "TILED_SPARSE" if sparse else "TILED_FULL"
    one.DimensionOrganizationSequence = [_item(DimensionOrganizationUID="1.2.826.0.1.4")]
    one.NumberOfFrames = len(tiles[frames])
    if sparse:
        one.PerFrameFunctionalGroupsSequence = [_frame(y, x, mpp) for y, x, _ in tiles[frames]]
    data = [encode(tile) for _, _, tile in tiles[frames]]
    one.PixelData = b"".join(data) if codec == "none" else encapsulate(data)
    one["PixelData"].VR = "OB"
    for name, value in values.items():
        setattr(one, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    one.save_as(path, enforce_file_format=True, little_endian=True, implicit_vr=False)
    return path


def _frame(y: int, x: int, mpp: float) -> Dataset:
    place = _item(RowPositionInTotalImagePixelMatrix=y + 1, ColumnPositionInTotalImagePixelMatrix=x + 1)
    place.XOffsetInSlideCoordinateSystem, place.YOffsetInSlideCoordinateSystem = (
        20.0 - y * mpp / 1000,
        40.0 - x * mpp / 1000,
    )
    place.ZOffsetInSlideCoordinateSystem = 0.0
    content = _item(DimensionIndexValues=[y // TILE + 1, x // TILE + 1])
    return _item(PlanePositionSlideSequence=[place], FrameContentSequence=[content])


def write_series(folder: Path, image: np.ndarray, levels: int = 3, codec: str = "none", sparse: bool = False, **values):
    """A pyramid by striding, one file a level, of halves."""
    resampled = ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED"]
    for number in range(levels):
        step = 2**number
        kind = {"ImageType": resampled} if number else {}
        facts = {"mpp": 0.5 * step, "InstanceNumber": number + 1} | kind | values
        write_instance(folder / f"level_{number}.dcm", image[::step, ::step], codec, sparse, **facts)
    return folder
