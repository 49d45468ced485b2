"""Lists of points in the formats of other programs."""

from pathlib import Path

import numpy as np
import pytest
from lungssl_data.points import read_points, write_points
from lungssl_data.volume import Geometry

POINTS = np.array([[-36.351, -36.974, -1204.5], [0.0, 1.25, 2.0]])


@pytest.mark.parametrize("suffix", [".csv", ".txt", ".pts"])
def test_points_come_back(tmp_path: Path, suffix: str) -> None:
    write_points(tmp_path / f"p{suffix}", POINTS)
    np.testing.assert_array_equal(read_points(tmp_path / f"p{suffix}"), POINTS)


def test_elastix_reads_and_writes_these(tmp_path: Path) -> None:
    path = tmp_path / "p.pts"
    write_points(path, POINTS)
    assert path.read_text().splitlines()[:3] == ["point", "2", "-36.351000 -36.974000 -1204.500000"]
    path.write_text("index\n1\n3 2 1\n")
    c, s = np.cos(0.3), np.sin(0.3)
    turned = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    grid = Geometry(shape=(4, 5, 6), spacing_mm=(1.0, 2.0, 3.0), origin_mm=(-7.0, 5.0, 11.0), direction=turned)
    expected = [-7 + 3 * c - 4 * s, 5 + 3 * s + 4 * c, 11 + 3]
    np.testing.assert_allclose(read_points(path, grid), [expected])
    with pytest.raises(ValueError, match="holds voxel indices; name the image"):
        read_points(path)


def test_columns_are_found_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("id,z_mm,fixed_x_mm,y\n7,3.0,1.0,2.0\n8,6.0,4.0,5.0\n")
    np.testing.assert_array_equal(read_points(path), [[1, 2, 3], [4, 5, 6]])
    path.write_text("a_x,b_x,y,z\n1,2,3,4\n")
    with pytest.raises(ValueError, match="names a_x, b_x, y, z; expected one column each"):
        read_points(path)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "1 2 3\n1 2 x\n", r"p\.txt, line 2: expected numbers"),
        ("p.txt", "1 2\n", r"three numbers a line, got \[1\.0, 2\.0\]"),
        ("p.txt", "7 1 2 3\n", r"three numbers a line, got \[7\.0, 1\.0, 2\.0, 3\.0\]"),
        ("p.csv", "7,1,2,3\n", r"three numbers a line, got \[7\.0, 1\.0, 2\.0, 3\.0\]"),
        ("p.txt", "", "three numbers a line, got none"),
        ("p.txt", "1 2 nan\n", "line 1: expected numbers"),
        ("p.pts", "1 2 3\n", "begins with `point` or `index`"),
        ("p.pts", "point\n2\n1 2 3\n", "says 2 points and has 1"),
        ("p.json", "[]", r"read and written as \.csv, \.txt, \.pts"),
    ],
)
def test_what_is_no_list_of_points_is_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        read_points(tmp_path / name)
