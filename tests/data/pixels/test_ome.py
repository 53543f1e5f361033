"""OME-XML of well-formed and of other files."""

from pathflip_jax.data.pixels.ome import Ome, read_ome

HEAD = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'


def _xml(pixels: str = "", channels: str = "") -> str:
    return f'{HEAD}<Image ID="I"><Pixels SizeX="20" SizeY="10" {pixels}>{channels}</Pixels></Image></OME>'


def test_the_image_of_the_size_is_the_one():
    channels = '<Channel Name="Red" SamplesPerPixel="1"/><Channel Name="Green"/>'
    found = read_ome(_xml('PhysicalSizeX="0.5" PhysicalSizeY="500" PhysicalSizeYUnit="nm"', channels), 20, 10)
    assert found == Ome(0.5, 0.5, 0.0, ("Red", "Green"), (1, 1))
    assert read_ome(_xml(), 10, 20) is None


def test_what_cannot_be_read_says_nothing():
    assert read_ome("ImageJ=1.53\nunit=um", 20, 10) is None
    assert read_ome(_xml()[:-5], 20, 10) is None
    assert read_ome(f'<!DOCTYPE a [<!ENTITY b "c">]>{_xml()}', 20, 10) is None
    for pixels in ('PhysicalSizeX="half"', 'PhysicalSizeX="-1"', 'PhysicalSizeX="nan"', 'PhysicalSizeXUnit="pixel"'):
        assert read_ome(_xml(pixels), 20, 10)[:3] == (0.0, 0.0, 0.0)
    pixels = 'PhysicalSizeX="0.5" PhysicalSizeXUnit="reference frame"'
    assert read_ome(_xml(pixels), 20, 10)[:2] == (0.0, 0.0)
