"""What samples look like beside their data: means, counts, tables and neighbours, by hand and by brute force."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from diffusion_book import core, inspection
from diffusion_book.data import load
from diffusion_book.inspection import (
    Classification,
    ClassMeanScore,
    Nearest,
    class_mean_score,
    class_means,
    class_spread,
    classification_table,
    label_counts,
    nearest_training_images,
    read_labels,
)
from diffusion_book.lenet import lenet_features, load_lenet


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some(n=30, shape=(1, 6, 5), seed=0):
    return torch.randint(0, 256, (n, *shape), generator=generator(seed), dtype=torch.uint8)


def signed(pixels):
    return pixels.float() / 127.5 - 1


def pixels_of(x):
    """Pixels in [0, 1] as float64 rows, in NumPy."""
    x = x.numpy()
    x = x / 255 if x.dtype == np.uint8 else (np.clip(x.astype(float), -1, 1) + 1) / 2
    return x.reshape(len(x), -1)


def distances(a, b):
    """Lengths of all differences, one by one."""
    return np.array([[np.sqrt(((x - y) ** 2).sum()) for y in pixels_of(b)] for x in pixels_of(a)])


# --- what the judge reads ---------------------------------------------------------------------------------------


def test_labels_are_the_largest_logits():
    x = some(40, (1, 28, 28))
    with torch.no_grad():
        expected = load_lenet()(x.float() / 255).argmax(1)
    assert torch.equal(read_labels(x), expected) and torch.equal(read_labels(signed(x)), expected)
    assert torch.equal(label_counts(x), torch.tensor([(expected == k).sum() for k in range(10)]))


@pytest.mark.parametrize("labels", [[2, 0, 2, 3], np.array([2, 0, 2, 3]), torch.tensor([2, 0, 2, 3]).byte()])
def test_labels_pass_through(labels):
    assert read_labels(labels, 4).tolist() == [2, 0, 2, 3] and read_labels(labels).dtype == torch.int64
    assert label_counts(labels, 5).tolist() == [1, 0, 2, 1, 0]


@pytest.mark.parametrize("function", [read_labels, label_counts, lambda given: classification_table(given, [0])])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([0, 10], r"labels must lie in 0\.\.9; got 0 to 10"),
        ([-1, 3], r"labels must lie in 0\.\.9; got -1 to 3"),
        ([0.0, 1.0], r"whole labels \(n,\); got \(2,\) in torch.float32"),
        ([], r"whole labels \(n,\); got \(0,\)"),
        ([[1, 2]], r"need images \(n, 1, 28, 28\) or whole labels \(n,\); got \(1, 2\)"),
        (torch.full((2, 1, 8, 8), -1.0), r"images must have shape \(n, 1, 28, 28\).*\(2, 1, 8, 8\)"),
    ],
)
def test_bad_labels_are_refused(function, given, said):
    with pytest.raises(ValueError, match=said):
        function(given)


# --- mean images and the class-mean score -----------------------------------------------------------------------


def test_means_are_those_of_each_class():
    x, y = some(2500), torch.randint(0, 3, (2500,), generator=generator(1))  # more than one block
    means = class_means(x, y, num_classes=4)
    for k in range(3):
        np.testing.assert_allclose(pixels_of(means)[k], pixels_of(x)[y.numpy() == k].mean(0), atol=1e-6)
    assert means.shape == (4, 1, 6, 5) and means.dtype == torch.float32 and means[3].isnan().all()
    torch.testing.assert_close(class_means(signed(x), y, num_classes=4)[:3], means[:3])


def test_means_cut_off_what_lies_beyond():
    assert class_means(torch.tensor([-1.0, 5.0]).reshape(2, 1, 1, 1), [0, 0], num_classes=1).item() == 0


def test_means_take_the_labels_of_a_data_set_or_those_that_are_read():
    digits = load("digits", "test", size=28)
    torch.testing.assert_close(class_means(digits), class_means(digits.images, digits.labels))
    torch.testing.assert_close(class_means(digits.images), class_means(digits.images, read_labels(digits)))
    assert not torch.allclose(class_means(digits.images), class_means(digits), atol=0.01)


def test_means_refuse_another_number_of_labels():
    with pytest.raises(ValueError, match="as many labels as images; got 2 and 3"):
        class_means(some(3), [0, 1])


@pytest.mark.parametrize("shape", [(1, 6, 5), (3, 4, 4)])
def test_score_is_the_least_distance_over_the_number_of_pixels(shape):
    x, means = signed(some(1100, shape)), signed(some(7, shape, seed=1))
    all_pairs = distances(x, means) / np.prod(shape)
    result = class_mean_score(x, means)
    assert isinstance(result, ClassMeanScore)
    np.testing.assert_allclose(result.distance, all_pairs.min(1), rtol=1e-5)
    assert (result.nearest.numpy() == all_pairs.argmin(1)).all()
    assert result.score == pytest.approx(all_pairs.min(1).mean(), rel=1e-6)


def test_score_takes_a_labelled_data_set():
    digits = load("digits", "test")
    expected = class_mean_score(digits, class_means(digits))
    assert class_mean_score(digits, digits).score == expected.score


def test_a_mean_is_at_distance_zero_of_itself():
    x = signed(some(10, (1, 28, 28)))
    assert class_mean_score(x, x).score == 0  # not the square root of a rounding error
    assert class_mean_score(x, x).nearest.tolist() == list(range(10))


@pytest.mark.parametrize(("side", "channels"), [(28, 1), (8, 1), (64, 3)])
def test_no_score_exceeds_one_over_the_root_of_the_pixels(side, channels):
    most = 1 / (side * channels**0.5)
    black = torch.zeros(1, channels, side, side, dtype=torch.uint8)
    assert class_mean_score(black, 255 - black).score == pytest.approx(most, rel=1e-6)
    pattern = 255 * some(2, (channels, side, side)).remainder(2)
    assert class_mean_score(pattern[:1], 255 - pattern[:1]).score == pytest.approx(most, rel=1e-6)
    far = 100 * torch.randn(20, channels, side, side, generator=generator())  # clipped
    assert class_mean_score(far, pattern[:1]).score <= most * (1 + 1e-6)


def test_score_refuses_other_shapes_and_missing_means():
    with pytest.raises(ValueError, match=r"means must have shape \(n, 1, 6, 5\), n >= 1; got \(2, 1, 5, 6\)"):
        class_mean_score(some(3), some(2, (1, 5, 6)))
    with pytest.raises(ValueError, match="means hold NaN or infinity, first in image 1"):
        class_mean_score(some(3), class_means(some(3), [0, 0, 2], num_classes=3))
    with pytest.raises(TypeError, match="images must be floats"):
        class_mean_score(some(3).long(), some(2))


# --- classification ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [4, 10])
def test_shares_are_those_of_the_definitions(classes):
    y = torch.randint(0, 4, (200,), generator=generator(1))
    answers = torch.where(torch.rand(200, generator=generator(2)) < 0.6, y, (y + 1) % 4)
    table = classification_table(y, answers, classes)
    assert isinstance(table, Classification) and table.confusion.shape == (classes, classes)
    for i in range(classes):
        assert [int(((y == i) & (answers == j)).sum()) for j in range(classes)] == table.confusion[i].tolist()
    for k in range(4):
        hits = float(((y == k) & (answers == k)).sum())
        read, wanted = float((answers == k).sum()), float((y == k).sum())
        shares = float(table.precision[k]), float(table.recall[k]), float(table.f1[k])
        assert shares == pytest.approx((hits / read, hits / wanted, 2 * hits / (read + wanted)))
    assert table.accuracy == pytest.approx(float((y == answers).sum()) / 200)
    assert table.precision[4:].isnan().all() and table.recall[4:].isnan().all() and table.f1[4:].isnan().all()


def test_table_reads_images():
    digits = load("digits", "test", size=28)
    table = classification_table(digits.labels, digits)
    assert torch.equal(table.confusion.sum(1), digits.labels.bincount())
    assert torch.equal(table.confusion.sum(0), label_counts(digits.images))


def test_table_prints_as_markdown():
    table = classification_table([0, 0, 1, 1, 1], [0, 1, 1, 1, 3], num_classes=4)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in str(table).splitlines()]
    assert rows[0] == ["class", "precision", "recall", "F1", "wanted"]
    assert rows[2] == ["0", "1.000", "0.500", "0.667", "2"]
    assert rows[4] == ["2", "–", "–", "–", "0"] and rows[5] == ["3", "0.000", "–", "0.000", "0"]
    assert rows[6] == ["mean", "0.556", "0.583", "0.444", "5"]
    assert table._repr_markdown_() == str(table)


def test_table_refuses_another_number_of_labels():
    with pytest.raises(ValueError, match="one wanted label for each image; got 2 and 3"):
        classification_table([1, 2], [1, 2, 3])


def test_import_is_light():
    code = "import sys, diffusion_book.inspection; print(sorted({'sklearn', 'scipy', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- nearest training images ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 40])
@pytest.mark.parametrize("itself", [False, True])
def test_neighbours_are_those_of_brute_force(k, itself):
    train = some(41, seed=1)
    images = train if itself else signed(some(17)) * 1.3
    lengths = distances(images, train)
    if itself:
        np.fill_diagonal(lengths, np.inf)
    found = nearest_training_images(images, train, k, itself=itself)
    assert isinstance(found, Nearest) and found.indices.dtype == torch.int64
    np.testing.assert_allclose(found.distance, np.sort(lengths, 1)[:, :k] / 30**0.5, rtol=1e-5)
    np.testing.assert_array_equal(found.indices, np.argsort(lengths, 1)[:, :k])


def test_blocks_change_nothing():
    shape = (1, 200, 200)  # large images: blocks of 20 queries and 100 training images
    images, train = some(45, shape), some(230, shape, seed=1)
    lengths = torch.cdist(torch.tensor(pixels_of(images)), torch.tensor(pixels_of(train)))
    expected = lengths.topk(3, largest=False)
    found = nearest_training_images(images, train, k=3)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.distance, (expected.values / 200).float(), rtol=1e-5, atol=0)
    alone = nearest_training_images(train, train, itself=True)
    lengths = torch.cdist(torch.tensor(pixels_of(train)), torch.tensor(pixels_of(train))).fill_diagonal_(torch.inf)
    assert torch.equal(alone.indices[:, 0], lengths.argmin(1))


def test_copies_come_out_as_zero_however_bright_the_images():
    train = 255 - some(300, (1, 28, 28)).div(20, rounding_mode="floor")  # long vectors, small differences
    train[:, :, 0, 0] = 0
    order = torch.randperm(300, generator=generator())
    for images in (train[order], signed(train[order])):
        found = nearest_training_images(images, train, k=2)
        assert found.copies == 300 and torch.equal(found.indices[:, 0], order)
        assert found.distance[:, 0].max() < 1e-6 < 1e-3 < found.distance[:, 1].min()
    changed = train[order].clone()
    changed[:7, 0, 3, 4] ^= 1  # one grey level in one pixel
    found = nearest_training_images(changed, train)
    assert found.copies == 293 and torch.equal(found.indices[:, 0], order)
    torch.testing.assert_close(found.distance[:7, 0], torch.full((7,), 1 / 255 / 28), rtol=1e-4, atol=0)


def test_an_image_is_not_its_own_neighbour_but_a_twin_is():
    train = torch.cat([some(20), some(20)[4:5]])
    found = nearest_training_images(train, train, itself=True)
    assert found.copies == 2 and found.indices[4, 0] == 20 and found.indices[20, 0] == 4
    assert (found.indices[:, 0] != torch.arange(21)).all()
    assert nearest_training_images(train, train).copies == 21


def test_one_is_the_largest_distance():
    black = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    assert nearest_training_images(black, 255 - black).distance.item() == pytest.approx(1, rel=1e-6)


def test_memory_stays_bounded(monkeypatch):
    largest = []

    def watched(x):
        largest.append(x.numel())
        return x.float() / 255

    monkeypatch.setattr(inspection, "unit_pixels", watched)
    nearest_training_images(some(1500, (1, 28, 28)), some(20_000, (1, 28, 28), seed=1))
    assert max(largest) < 8_000_000 < 20_000 * 784  # floats: never the whole training set


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: nearest_training_images(some(3), some(4), k=5), r"k must lie in 1\.\.4; got 5"),
        (lambda: nearest_training_images(some(3), some(4), k=0), r"k must lie in 1\.\.4; got 0"),
        (lambda: nearest_training_images(some(3), some(3), k=3, itself=True), r"k must lie in 1\.\.2; got 3"),
        (lambda: nearest_training_images(some(3), some(4), itself=True), "itself=True.*got 3 and 4 images"),
        (lambda: nearest_training_images(some(3), some(4, (1, 5, 6))), r"train must have shape \(n, 1, 6, 5\)"),
        (lambda: nearest_training_images(some(3)[:0], some(4)), r"images must have shape .*n >= 1; got \(0, 1, 6, 5\)"),
        (lambda: nearest_training_images(some(3), signed(some(4)) * torch.nan), "train hold NaN or infinity"),
    ],
)
def test_bad_neighbours_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_images_in_zero_one_are_warned_about():
    with pytest.warns(UserWarning, match=r"no pixel is below 0: are the train in \[0, 1\]"):
        nearest_training_images(some(3), some(4) / 255)


# --- MNIST ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mnist():
    if not (core.data_dir() / "mnist").is_dir():
        pytest.skip("MNIST is not in the data folder")
    return load("mnist"), load("mnist", "test")


def test_published_class_mean_score_and_accuracy(mnist):
    train, test = mnist
    of_test, of_train = class_mean_score(test, train), class_mean_score(train, train)
    assert round(of_test.score, 4) == round(of_train.score, 4) == 0.0080
    assert round(float((of_test.nearest == test.labels).double().mean()), 2) == 0.82
    assert round(float((of_test.nearest == test.labels).double().mean()), 4) == 0.8203


def test_published_random_baseline_cannot_be(mnist):
    train, _ = mnist
    means = class_means(train)
    opposite = torch.where(means < 0, 1.0, -1.0)  # as far as an image can be from each mean
    highest = class_mean_score(opposite, means)
    noises = [torch.rand(500, 1, 28, 28, generator=generator()) * 2 - 1]
    noises += [scale * torch.randn(500, 1, 28, 28, generator=generator()) for scale in (1, 10, 1e4)]
    scores = [class_mean_score(noise, means).score for noise in noises]
    assert max(*scores, float(highest.distance.max())) < 1 / 28 < 0.0913 / 2
    assert 0.017 < scores[0] < scores[1] < scores[3]


def test_nearest_training_image_reads_digits(mnist):
    train, test = mnist
    some_of_them = test.take(slice(0, 10_000, 25))
    found = nearest_training_images(some_of_them, train)
    agree = (train.labels[found.indices[:, 0]] == some_of_them.labels).double().mean()
    assert abs(agree - 0.969) < 3 * (0.969 * 0.031 / 400) ** 0.5  # 1 nearest neighbour on MNIST: 3.1 % errors
    assert found.copies == 0  # no test image is a training image
    hundred = nearest_training_images(train.take(slice(0, 100)), train)
    assert hundred.copies == 100 and torch.equal(hundred.indices[:, 0], torch.arange(100))


def test_judge_reads_the_test_set_as_its_card_says(mnist):
    _, test = mnist
    table = classification_table(test.labels, test)
    assert table.accuracy == pytest.approx(0.9928, abs=5e-4) and table.f1.min() > 0.98
    assert torch.equal(label_counts(test.labels), table.confusion.sum(1))
    assert (label_counts(lenet_read(test)) - label_counts(test.labels)).abs().max() < 30


def lenet_read(images):
    return load_lenet().head(lenet_features(images)).argmax(1)


# Diversity within a class


def test_spread_is_the_trace_of_the_covariance_of_each_class():
    generator = torch.Generator().manual_seed(0)
    features, y = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    found = class_spread(features, y, 4)
    for k in range(3):
        own = np.cov(features[y == k].double().numpy(), rowvar=False).trace()
        assert found[k].item() == pytest.approx(own)
    assert found[3].isnan() and found.dtype == torch.float64


def test_one_image_of_a_class_has_no_spread():
    found = class_spread(torch.ones(3, 2), [0, 1, 1], 2)
    assert found[0].isnan() and found[1] == 0


@pytest.mark.parametrize(("features", "labels"), [(torch.ones(3), [0, 1, 1]), (torch.ones(3, 2), [0, 1])])
def test_spread_needs_a_label_for_each_row(features, labels):
    with pytest.raises(ValueError, match=r"need features \(n, d\) and labels"):
        class_spread(features, labels, 2)
