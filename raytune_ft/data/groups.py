"""Groups that no split divides: rows that ask the same or begin so, near-duplicates, and rows of one conversation.

Nodes are groups of rows that ask the same, by 62 bits of their hash, first questions and conversations. Those of test
files have smaller numbers than all others, so a group that holds a test row is named by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytune_ft.data import components
from raytune_ft.data.blocks import Blocks, pass_here
from raytune_ft.data.config import DataCollectionConfig, NearDuplicates
from raytune_ft.data.minhash import place_ids, sketch_rows
from raytune_ft.data.near import near_edges, near_labels, near_reasons
from raytune_ft.data.openings import (
    NOT_TEST,
    ask_whole,
    common_openings,
    most_prompts,
    node_of,
    shared_only,
    with_question,
)
from raytune_ft.data.rows import mark
from raytune_ft.data.shingles import Places, flat
from raytune_ft.data.strata import field_values

_LINK_FIELDS = ("low", "high", "low_stratum", "high_stratum")
_NO_STRATUM = -1
TESTED_GROUP = "group is in test_sources"


def link_rows(rows: Blocks, config: DataCollectionConfig, labels: Sequence[str], tests: int) -> Blocks:
    """The rows with near-duplicates marked, and with one `group` for all that must stay in one split.

    Args:
        rows: settled, in ranges of `place`.
        config: says what makes a near-duplicate and a group.
        labels: the names of the source files, by number.
        tests: how many of them, the first, are of `test_sources`.
    """
    links = rows.map(conversation_links, field=config.group_by) if config.group_by else None
    if config.near_duplicates is not NearDuplicates.KEEP:
        edges = near_edges(rows.map(sketches), config.near_duplicate_threshold)
        if config.near_duplicates is NearDuplicates.GROUP:
            between = edges.map(near_links)
            links = between if links is None else links.union(between)
        if edges.rows():
            clusters = near_labels(edges).map(with_place)
            only_tests = config.near_duplicates is NearDuplicates.GROUP
            rows = rows.joined(clusters, "place", mark_near, labels=labels, tests=tests, only_tests=only_tests)
    rows, same = question_links(rows.map(with_question).kept())
    links = (same if links is None else links.union(same)).kept()
    if links.rows():
        rows = rows.joined(group_labels(links).map(with_place), "place", join_groups)
    return rows.kept()


def question_links(rows: Blocks) -> tuple[Blocks, Blocks]:
    """The rows with what tells their questions, and links between prompts and the questions that several have."""
    links = rows.map(prompt_questions).kept()
    common = links.by_key("high").map(common_openings, most=most_prompts(links.rows())).kept()
    if common.rows():
        rows = rows.joined(common.map(with_place), "place", ask_whole).kept()
        links = rows.map(prompt_questions)
    return rows, links.by_key("high").map(shared_only)


def prompt_questions(rows: pa.Table) -> pa.Table:
    """A link from each usable prompt's node to its question; all rows of a node must be in the table."""
    rows = rows.filter(pc.and_(pc.is_null(rows.column("reason")), pc.is_valid(rows.column("question"))))
    nodes, first = np.unique(rows.column("node").to_numpy(), return_index=True)
    rows = rows.take(pa.array(first))
    columns = [pa.array(nodes), rows.column("question"), rows.column("stratum"), np.full(len(nodes), _NO_STRATUM)]
    return pa.table(columns, names=_LINK_FIELDS).combine_chunks()


def with_nodes(rows: pa.Table) -> pa.Table:
    """The table with `prompt` (its `group` so far), and `place` and `node`: that hash as 62 bits, and as a node."""
    digits = "".join(rows.column("group").to_pylist())
    place = (np.frombuffer(bytes.fromhex(digits), ">u8").astype(np.uint64) >> np.uint64(2)).astype(np.int64)
    node = np.where(rows.column("is_test").to_numpy(), place, place | NOT_TEST)
    rows = rows.append_column("prompt", rows.column("group"))
    return rows.append_column("place", pa.array(place)).append_column("node", pa.array(node))


def with_place(labels: pa.Table) -> pa.Table:
    """Labels of nodes with the `place` that rows of the node have."""
    place = labels.column("node").to_numpy() & (NOT_TEST - 1)
    return labels.append_column("place", pa.array(place))


def sketches(rows: pa.Table) -> pa.Table:
    """The sketches of settled rows."""
    return sketch_rows(rows, rows.column("node").to_numpy())


def conversations(rows: pa.Table, field: str) -> Places:
    """The node of each row's conversation, by a metadata field; -1 for rows without it."""
    nodes = (node_of(value) if value else -1 for value in field_values(rows, field))
    return np.fromiter(nodes, np.int64, rows.num_rows)


def conversation_links(rows: pa.Table, field: str) -> pa.Table:
    """A link from each usable row's node to its conversation's."""
    rows = rows.filter(pc.is_null(rows.column("reason")))
    nodes = conversations(rows, field)
    rows, nodes = rows.filter(pa.array(nodes >= 0)), nodes[nodes >= 0]
    columns = [rows.column("node"), nodes, rows.column("stratum"), np.full(len(nodes), _NO_STRATUM)]
    return pa.table(columns, names=_LINK_FIELDS).combine_chunks()


def near_links(edges: pa.Table) -> pa.Table:
    """A link for each pair of near-duplicates."""
    names = ("low_node", "high_node", "low_stratum", "high_stratum")
    return edges.select(names).rename_columns(_LINK_FIELDS)


def group_labels(links: Blocks) -> Blocks:
    """For each node that has rows its `root`, the group's name, and the group's `stratum`: its smallest node's."""
    if links.rows() <= components.FEW_EDGES:
        return links.together().map(pass_here, run=shuffled_groups, settings={}).kept()
    return shuffled_groups(links).kept()


def shuffled_groups(links: Blocks) -> Blocks:
    """The labels by shuffles of nodes and roots."""
    roots = components.components(links).map(as_members)
    members = roots.union(links.map(link_ends)).by_key("node").map(member_strata)
    return members.by_key("root").map(one_stratum)


_MEMBER_SCHEMA = pa.schema([pa.field(name, pa.int64()) for name in ("node", "root", "stratum")])


def as_members(roots: pa.Table) -> pa.Table:
    """Roots of nodes, the strata unknown."""
    columns = [roots.column("node"), roots.column("root"), pa.nulls(roots.num_rows, pa.int64())]
    return pa.table(columns, schema=_MEMBER_SCHEMA)


def link_ends(links: pa.Table) -> pa.Table:
    """The two ends of each link that have strata, the roots unknown."""
    node = pa.concat_arrays([flat(links.column(name)) for name in ("low", "high")])
    stratum = pa.concat_arrays([flat(links.column(name)) for name in ("low_stratum", "high_stratum")])
    table = pa.table([node, pa.nulls(len(node), pa.int64()), stratum], schema=_MEMBER_SCHEMA)
    return table.filter(pc.not_equal(stratum, _NO_STRATUM))


def member_strata(members: pa.Table) -> pa.Table:
    """Each node that has a stratum with its root; roots and ends of a node must all be in the table."""
    known = pc.is_valid(members.column("root"))
    roots = members.filter(known).sort_by("node")
    ends = members.filter(pc.invert(known))
    nodes, first = np.unique(ends.column("node").to_numpy(), return_index=True)
    # A node linked to nothing but itself has no component.
    at = np.searchsorted(roots.column("node").to_numpy(), nodes)
    at = np.minimum(at, max(roots.num_rows - 1, 0))
    linked = roots.column("node").to_numpy()[at] == nodes if roots.num_rows else np.zeros(len(nodes), bool)
    columns = [
        pa.array(nodes[linked]),
        roots.column("root").take(at[linked]),
        ends.column("stratum").take(first[linked]),
    ]
    return pa.table(columns, schema=_MEMBER_SCHEMA)


def one_stratum(members: pa.Table) -> pa.Table:
    """The members with the stratum of the smallest of each root; all members of a root must be in the table."""
    node, root, stratum = (members.column(name).to_numpy() for name in _MEMBER_SCHEMA.names)
    order = np.lexsort((node, root))
    _, starts, place = np.unique(root[order], return_index=True, return_inverse=True)
    columns = [node[order], root[order], stratum[order][starts][place]]
    return pa.table([pa.array(column, pa.int64()) for column in columns], schema=_MEMBER_SCHEMA)


def mark_near(rows: pa.Table, clusters: pa.Table, labels: Sequence[str], tests: int, only_tests: bool) -> pa.Table:
    """The rows with near-duplicates marked, and with the first row of each one's cluster in `cluster` (-1: none)."""
    ids = place_ids(rows)
    order = np.argsort(clusters.column("id").to_numpy())
    known, roots = (clusters.column(name).to_numpy()[order] for name in ("id", "root"))
    cluster = np.full(len(ids), -1, np.int64)
    if len(known):
        at = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        cluster = np.where(known[at] == ids, roots[at], -1)
    reasons = near_reasons(ids, clusters, labels, tests, only_tests=only_tests)
    return mark(rows, reasons).append_column("cluster", pa.array(cluster))


def join_groups(rows: pa.Table, members: pa.Table) -> pa.Table:
    """The rows with group and stratum of what they are linked to; those linked to test files are marked."""
    columns = (members.column(name).to_pylist() for name in _MEMBER_SCHEMA.names)
    found = {node: (root, stratum) for node, root, stratum in zip(*columns, strict=True)}
    groups, strata, reasons = [], [], []
    own = (rows.column(name).to_pylist() for name in ("node", "group", "stratum", "is_test"))
    for node, group, stratum, is_test in zip(*own, strict=True):
        root, joined = found.get(node, (None, stratum))
        groups.append(group if root is None else f"{root:016x}")
        strata.append(joined)
        leaks = root is not None and root < NOT_TEST and not is_test
        reasons.append(TESTED_GROUP if leaks else None)
    for name, column in (("group", pa.array(groups, pa.string())), ("stratum", pa.array(strata, pa.int64()))):
        rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    return mark(rows, reasons)
