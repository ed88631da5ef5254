"""The tree over features: planted parents, what is pruned, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dictlearn.feature_tree import FeatureTree, feature_tree

KEY = jax.random.key(0)
BLOCKS, EACH, WIDTH = 5, 3, 12


def family() -> tuple[np.ndarray, np.ndarray]:
    """Children that share half of their energy with the others of their block, and the parents.

    A block's atoms have dimensions of their own; a parent is the sum of its children.
    """
    rng = np.random.default_rng(0)
    children = np.zeros((BLOCKS, EACH, BLOCKS, WIDTH))
    for block in range(BLOCKS):
        shared = rng.standard_normal(WIDTH)
        own = rng.standard_normal((EACH, WIDTH))
        children[block, :, block] = shared + 0.8 * own
    atoms = children.reshape(BLOCKS * EACH, BLOCKS * WIDTH)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    parents = atoms.reshape(BLOCKS, EACH, -1).sum(axis=1)
    return atoms, parents / np.linalg.norm(parents, axis=1, keepdims=True)


def tree_of(order: np.ndarray) -> FeatureTree:
    atoms = jnp.asarray(family()[0][order], jnp.float32)
    return feature_tree(atoms, (BLOCKS,), winners=1 / BLOCKS, n_steps=200, key=KEY)


def test_planted_parents_are_found_with_their_children() -> None:
    order = np.random.default_rng(1).permutation(BLOCKS * EACH)
    tree = tree_of(order)
    cosine = family()[1] @ np.asarray(tree.atoms[1]).T
    assert (cosine.max(axis=1) > 0.97).all()
    nodes = tree.nodes()
    assert [node["level"] for node in nodes] == [0] * BLOCKS * EACH + [1] * BLOCKS
    for node in nodes[BLOCKS * EACH :]:
        block = int(cosine[:, node["feature"]].argmax())
        mine = {int(order[child["feature"]]) for child in node["children"]}
        assert mine == set(range(EACH * block, EACH * (block + 1)))
        weights = [child["weight"] for child in node["children"]]
        assert weights == sorted(weights, reverse=True)
        assert weights[0] == 1
        assert weights[-1] >= 0.15


def test_levels_follow_each_other() -> None:
    atoms = 5 * jnp.asarray(family()[0], jnp.float32)
    tree = feature_tree(atoms, (6, 3, 2), winners=1.0, n_steps=30, key=KEY)
    assert [len(level) for level in tree.atoms] == [15, 6, 3, 2]
    assert [codes.shape for codes in tree.codes] == [(15, 6), (6, 3), (3, 2)]
    for below, codes, above in zip(tree.atoms, tree.codes, tree.atoms[1:], strict=False):
        np.testing.assert_allclose(np.linalg.norm(above, axis=1), 1, atol=1e-5)
        assert (codes >= 0).all()
        assert ((below - codes @ above) ** 2).sum() < 0.9 * len(below)


def by_hand(*codes: list[list[float]]) -> FeatureTree:
    counts = [len(codes[0]), *(len(level[0]) for level in codes)]
    return FeatureTree(
        tuple(jnp.eye(count, 8) for count in counts), tuple(jnp.array(level) for level in codes)
    )


def edges(tree: FeatureTree) -> dict[tuple[int, int], dict[tuple[int, int], float]]:
    nodes = json.loads(json.dumps(tree.nodes()))
    return {
        (node["level"], node["feature"]): {
            (child["level"], child["feature"]): round(child["weight"], 3)
            for child in node["children"]
        }
        for node in nodes
    }


def test_light_children_and_more_than_four_are_left_out() -> None:
    light = [[2.0], [0.31], [0.29], [1.0]]
    assert edges(by_hand(light))[1, 0] == {(0, 0): 1, (0, 3): 0.5, (0, 1): 0.155}
    many = [[0.6], [1.0], [0.9], [0.8], [0.7]]
    assert list(edges(by_hand(many))[1, 0]) == [(0, 1), (0, 2), (0, 3), (0, 4)]


def test_a_feature_with_one_child_gives_its_place_to_it() -> None:
    """Level 1: a pair, a single, nothing, and the same single again, heavier."""
    below = [[1.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 1.0, 0, 3.0]]
    # The first has the pair and the single, the second the single twice and nothing.
    above = [[1.0, 0], [0.5, 0.5], [0.4, 0.9], [0, 1.0]]
    found = edges(by_hand(below, above))
    assert set(found) == {(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)}
    assert found[1, 0] == {(0, 0): 1, (0, 1): 1}
    assert found[2, 0] == {(1, 0): 1, (0, 2): 0.5}


def test_more_features_than_below() -> None:
    with pytest.raises(ValueError, match=r"^sizes: 6 features at level 2 are more than"):
        feature_tree(jnp.eye(8), (5, 6), n_steps=0, key=KEY)


def test_a_zero_atom_is_made_of_nothing() -> None:
    atoms = jnp.asarray(family()[0], jnp.float32).at[0].set(0)
    tree = feature_tree(atoms, (BLOCKS,), winners=1.0, n_steps=20, key=KEY)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
    np.testing.assert_array_equal(tree.codes[0][0], 0)
