"""A spec in words: what may move, where, and what pinned the rest."""

from permjax.symmetry.spec import Axis, Fixed, Leaf, Member, Of, PermutationSpec, Product, Sum, walk


def draw(axis: Axis, spec: PermutationSpec) -> str:
    """Return an axis tree as text, `*` for products and `|` for sums."""
    match axis:
        case Fixed(size):
            return str(size)
        case Of(group):
            return f"{group}={spec.group(group).size}"
        case Product(factors):
            return "(" + " * ".join(draw(f, spec) for f in factors) + ")"
        case Sum(segments):
            return "(" + " | ".join(draw(s, spec) for s in segments) + ")"


def explain(spec: PermutationSpec) -> str:
    """Return the page behind `PermutationSpec.explain`."""
    lines = [f"{len(spec.groups)} groups over {len(spec.leaves)} leaves"]
    if spec.verification is not None:
        wide, single, tolerance = spec.verification
        where = "" if tolerance < 1e-6 else f"; the function computes in float32, so {tolerance:.0e} was allowed"
        lines.append(f"verified: random permutations change the output by {wide:.1e} (float32: {single:.1e}){where}")
    for group in spec.groups:
        per = f", one permutation per {' and '.join(group.per)}" if group.per else ""
        mark = "  (not verified)" if group.name in spec.unverified else ""
        lines.append(f"\n{group.name}: {group.size} units{per}{mark}")
        lines += [f"    {m.leaf}, axis {m.axis}{_place(spec, m)}" for m in spec.members(group.name)]
    pinned = [row for leaf in spec.leaves for row in _pinned(leaf)]
    if pinned:
        lines += ["\npinned axes:", *pinned]
    return "\n".join(lines)


def _place(spec: PermutationSpec, member: Member) -> str:
    axis = spec.leaf(member.leaf).axes[member.axis]
    return f" = {draw(axis, spec)}" if member.path else ""


def _pinned(leaf: Leaf) -> list[str]:
    role = "" if leaf.role == "weight" else f" [{leaf.role}]"
    return [
        f"    {leaf.name}{role}, axis {i}{f', part {path}' if path else ''} ({end.size}): {end.reason or 'fixed'}"
        for i, axis in enumerate(leaf.axes)
        for path, end in walk(axis)
        if isinstance(end, Fixed) and end.size > 1
    ]
