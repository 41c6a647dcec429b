"""The table and the plot of the methods."""

from kimi_core.long2short.comparison import Point, draw, table


def point(method, seed, tokens, accuracy=0.5, samples=80):
    return Point(method, seed, 1.0, accuracy, tokens, 20, samples, 1.5)


POINTS = [
    point("long", 0, 80.0, samples=0),
    point("rl", 0, 30.0, 0.4),
    point("long", 1, 80.0, samples=0),
    point("rl", 1, 50.0, 0.6),
]


def test_a_row_for_each_method_with_its_spread():
    assert table(POINTS).splitlines()[2:] == [
        "| long | 2 | 1 | 0.5 | 80 | 1.00 | 0 | 1.5 |",
        "| rl | 2 | 1 | 0.5 ± 0.14 | 40 ± 14 | 0.50 | 80 | 1.5 |",
    ]
    assert table(POINTS[:2]).splitlines()[-1] == "| rl | 1 | 1 | 0.4 | 30 | 0.38 | 80 | 1.5 |"


def test_the_plot_is_a_picture_that_shows_every_point():
    pictures = [draw(POINTS[:count]) for count in (1, 2, 4)]
    assert all(one.startswith(b"\x89PNG") for one in pictures)
    assert len(set(pictures)) == 3
