"""Extents of axes: integers, or exact integer expressions over named symbols.

A `Dim` is a plain ``int`` wherever it is constant, else an `Expression`: a polynomial with integer
coefficients over atoms. An atom is a symbol, a floor division, a minimum or a maximum. Everything
else is written with these: ``a % b`` is ``a - b*(a//b)``, a division that rounds up is a floor
division. So equal extents that were computed in different ways mostly become the same expression,
and what cancels is gone: ``4*x//4`` is ``x``, and padding ``x`` to a multiple of 7 gives
``floor((x + 6)/7)*7`` however the exporter wrote it.

Expressions are immutable and compare by structure: unlike expressions may still be equal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

Interval = tuple[float, float]
"""Lowest and highest value, both included. Whole numbers, or minus and plus infinity."""


LONG = 256
"""Terms from which on a sum is neither divided out nor bounded as tightly: both take long then."""


@dataclass(frozen=True, slots=True)
class Symbol:
    """A named unknown integer."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Quotient:
    """``numerator`` divided by ``divisor``, rounded down, where that is not exact."""

    numerator: Dim
    divisor: Dim

    def __str__(self) -> str:
        divisor = str(self.divisor)
        if isinstance(self.divisor, Expression) and not self.divisor.is_product:
            divisor = f"({divisor})"
        numerator = str(self.numerator)
        if isinstance(self.numerator, Expression) and not self.numerator.is_product:
            numerator = f"({numerator})"
        return f"floor({numerator}/{divisor})"


@dataclass(frozen=True, slots=True)
class Least:
    """The smallest of two or more unlike extents."""

    of: frozenset[Dim]

    def __str__(self) -> str:
        return f"min({', '.join(sorted(map(str, self.of)))})"


@dataclass(frozen=True, slots=True)
class Greatest:
    """The largest of two or more unlike extents."""

    of: frozenset[Dim]

    def __str__(self) -> str:
        return f"max({', '.join(sorted(map(str, self.of)))})"


Atom = Symbol | Quotient | Least | Greatest
Monomial = frozenset[tuple[Atom, int]]
"""A product of atoms, each with its power; empty for the constant term."""

_ONE: Monomial = frozenset()


class Expression:
    """A polynomial that is not constant. Made by arithmetic on `symbol`, never directly."""

    def __init__(self, terms: dict[Monomial, int]) -> None:
        self.terms = terms

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Expression) and self.terms == other.terms)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(frozenset(self.terms.items()))

    @cached_property
    def _text(self) -> str:
        parts = []
        for monomial in sorted(self.terms, key=lambda m: (m == _ONE, _monomial_key(m))):
            coefficient = self.terms[monomial]
            factors = [
                str(atom) if power == 1 else f"{atom}^{power}"
                for atom, power in sorted(monomial, key=lambda f: str(f[0]))
            ]
            if abs(coefficient) != 1 or not factors:
                factors.append(str(abs(coefficient)))
            sign = "-" if coefficient < 0 else "+"
            parts.append(f" {sign} {'*'.join(factors)}")
        text = "".join(parts)
        return text[3:] if text.startswith(" + ") else f"-{text[3:]}"

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"<{self._text}>"

    @property
    def is_product(self) -> bool:
        """Whether this is one product rather than a sum."""
        return len(self.terms) == 1

    @cached_property
    def symbols(self) -> frozenset[str]:
        """Names of all symbols in this expression, those inside divisions included."""
        return frozenset(self.atoms_with)

    @cached_property
    def monomials_with(self) -> dict[Atom, list[Monomial]]:
        """Atom -> the monomials it is a factor of."""
        found: dict[Atom, list[Monomial]] = {}
        for monomial in self.terms:
            for atom, _ in monomial:
                found.setdefault(atom, []).append(monomial)
        return found

    @cached_property
    def atoms_with(self) -> dict[str, list[Atom]]:
        """Name of a symbol -> the atoms it occurs in."""
        found: dict[str, list[Atom]] = {}
        for atom in self.monomials_with:
            for name in _atom_symbols(atom):
                found.setdefault(name, []).append(atom)
        return found

    @property
    def bare_symbol(self) -> str | None:
        """The name of the symbol that this expression is, or None where it is more than one."""
        if len(self.terms) == 1:
            ((monomial, coefficient),) = self.terms.items()
            if coefficient == 1 and len(monomial) == 1:
                ((atom, power),) = monomial
                if isinstance(atom, Symbol) and power == 1:
                    return atom.name
        return None

    def __neg__(self) -> Dim:
        return Expression({m: -c for m, c in self.terms.items()})

    def __add__(self, other: Dim) -> Dim:
        return total((self, other))

    def __sub__(self, other: Dim) -> Dim:
        return total((self, -other))

    def __rsub__(self, other: int) -> Dim:
        return total((other, -self))

    def __mul__(self, other: Dim) -> Dim:
        if isinstance(other, int):
            if other == 1:
                return self
            return _made({m: c * other for m, c in self.terms.items()})
        terms: dict[Monomial, int] = {}
        for left, a in self.terms.items():
            for right, b in other.terms.items():
                key = _times(left, right)
                terms[key] = terms.get(key, 0) + a * b
        return _made(terms)

    __radd__ = __add__
    __rmul__ = __mul__

    def __floordiv__(self, other: Dim) -> Dim:
        return _floor_division(self, other)

    def __rfloordiv__(self, other: int) -> Dim:
        return _floor_division(other, self)

    def __mod__(self, other: Dim) -> Dim:
        return self - other * (self // other)

    def __rmod__(self, other: int) -> Dim:
        return other - self * (other // self)


Dim = int | Expression


def symbol(name: str) -> Expression:
    """Return the unknown called ``name``, which may be any string."""
    return Expression({frozenset({(Symbol(name), 1)}): 1})


def total(dims: Iterable[Dim]) -> Dim:
    """Return the sum of ``dims``."""
    terms: dict[Monomial, int] = {}
    for dim in dims:
        for monomial, coefficient in _terms(dim).items():
            terms[monomial] = terms.get(monomial, 0) + coefficient
    return _made(terms)


def product(dims: Iterable[Dim]) -> Dim:
    """Return the product of ``dims``: the number of elements of a tensor of this shape."""
    result: Dim = 1
    for dim in dims:
        result = result * dim
    return result


def ceil_division(dividend: Dim, divisor: Dim) -> Dim:
    """Return ``dividend / divisor`` rounded up, for a divisor above zero."""
    return (dividend + divisor - 1) // divisor


def minimum(*dims: Dim) -> Dim:
    """Return the smallest of ``dims``."""
    return _extreme(dims, least=True)


def maximum(*dims: Dim) -> Dim:
    """Return the largest of ``dims``."""
    return _extreme(dims, least=False)


def symbols(dim: Dim) -> frozenset[str]:
    """Return the names of the symbols that ``dim`` depends on."""
    return dim.symbols if isinstance(dim, Expression) else frozenset()


def substitute(dim: Dim, by: Mapping[str, Dim]) -> Dim:
    """Return ``dim`` with each symbol that is a key of ``by`` replaced."""
    if not isinstance(dim, Expression) or by.keys().isdisjoint(dim.symbols):
        return dim
    parts = []
    for monomial, coefficient in dim.terms.items():
        part: Dim = coefficient
        for atom, power in monomial:
            factor = _substitute_atom(atom, by)
            for _ in range(power):
                part = part * factor
        parts.append(part)
    return total(parts)


def interval(dim: Dim, ranges: Mapping[str, Interval]) -> Interval:
    """Return bounds of ``dim`` while each symbol stays in its range.

    Sound: no value of ``dim`` lies outside. Exact where ``dim`` rises or falls with each symbol,
    as extents mostly do, however often the symbol occurs. A symbol without a range may be any
    number from 0 up.
    """
    if not isinstance(dim, Expression):
        return dim, dim
    low, high = _naive(dim, ranges)
    if 1 < len(dim.terms) <= LONG and any(c < 0 for m, c in dim.terms.items() if m):
        for bounds in (_monotone(dim, ranges), _without_rounding(dim, ranges)):
            low, high = max(low, bounds[0]), min(high, bounds[1])
    return low, high


# Construction


def _terms(dim: Dim) -> dict[Monomial, int]:
    return dim.terms if isinstance(dim, Expression) else {_ONE: dim}


def _made(terms: dict[Monomial, int]) -> Dim:
    terms = {m: c for m, c in terms.items() if c}
    if not terms:
        return 0
    if len(terms) == 1 and _ONE in terms:
        return terms[_ONE]
    return Expression(terms)


def _times(left: Monomial, right: Monomial) -> Monomial:
    if not left or not right:
        return left or right
    powers = dict(left)
    for atom, power in right:
        powers[atom] = powers.get(atom, 0) + power
    return frozenset(powers.items())


def _over(left: Monomial, right: Monomial) -> Monomial | None:
    """Return ``left / right``, or None where it is no product of atoms."""
    powers = dict(left)
    for atom, power in right:
        powers[atom] = powers.get(atom, 0) - power
        if powers[atom] < 0:
            return None
    return frozenset((a, p) for a, p in powers.items() if p)


def _monomial_key(monomial: Monomial) -> str:
    return "*".join(sorted(f"{atom}^{power}" for atom, power in monomial))


def _atom_of(atom: Atom) -> Expression:
    return Expression({frozenset({(atom, 1)}): 1})


def _floor_division(dividend: Dim, divisor: Dim) -> Dim:
    if isinstance(divisor, int):
        if divisor < 0:
            return _floor_division(-dividend, -divisor)
        if isinstance(dividend, int):
            return dividend // divisor
        return _over_number(dividend, divisor)
    if dividend == 0:
        return 0
    if len(_terms(dividend)) <= LONG and (exact := _exact_quotient(dividend, divisor)) is not None:
        return exact
    dividend, divisor = _without_common_factor(dividend, divisor)
    if isinstance(divisor, int):
        return _floor_division(dividend, divisor)
    # Multiples of the divisor leave the division: (x*y + 1)//x is y + 1//x.
    whole = []
    if len(divisor.terms) == 1:
        ((below, factor),) = divisor.terms.items()
        for above, coefficient in _terms(dividend).items():
            quotient = _over(above, below)
            if quotient is not None and coefficient % factor == 0:
                whole.append(_made({quotient: coefficient // factor}))
    outside = total(whole)
    rest = dividend - outside * divisor
    return total((outside, 0 if rest == 0 else _atom_of(Quotient(rest, divisor))))


def _over_number(dividend: Expression, divisor: int) -> Dim:
    """Divide by a number above zero, into the one form that equal quotients share."""
    if divisor == 1:
        return dividend
    # Multiples of the divisor leave the division. Coefficients keep their sign (fmod), so that
    # -x//2 stays visible as such; the constant ends up in 0 .. divisor-1.
    whole: dict[Monomial, int] = {}
    rest: dict[Monomial, int] = {}
    for monomial, coefficient in dividend.terms.items():
        left = coefficient % divisor if not monomial else int(math.fmod(coefficient, divisor))
        whole[monomial] = (coefficient - left) // divisor
        if left:
            rest[monomial] = left
    outside = _made(whole)
    constant = rest.pop(_ONE, 0)
    if not rest:
        return outside
    # floor((g*r + c)/(g*b)) is floor((r + floor(c/g))/b).
    common = math.gcd(divisor, *rest.values())
    rest = {m: c // common for m, c in rest.items()}
    constant, divisor = constant // common, divisor // common
    if divisor == 1:
        return total((outside, _made(rest), constant))
    # floor(-a/b) is -floor((a + b-1)/b): the first term is positive in the common form.
    if rest[min(rest, key=_monomial_key) if len(rest) > 1 else next(iter(rest))] < 0:
        flipped = total((_made({m: -c for m, c in rest.items()}), divisor - 1 - constant))
        return outside - _floor_division(flipped, divisor)
    # floor((floor(a/b) + c)/d) is floor((a + b*c)/(b*d)).
    if len(rest) == 1:
        ((monomial, coefficient),) = rest.items()
        if coefficient == 1 and len(monomial) == 1:
            ((atom, power),) = monomial
            if power == 1 and isinstance(atom, Quotient) and isinstance(atom.divisor, int):
                inner = atom.numerator + atom.divisor * constant
                return outside + _floor_division(inner, atom.divisor * divisor)
    return outside + _atom_of(Quotient(_made({**rest, _ONE: constant}), divisor))


def _exact_quotient(dividend: Dim, divisor: Expression) -> Dim | None:
    """Return the polynomial q with q * divisor == dividend, or None where there is none."""
    atoms = sorted({a for d in (dividend, divisor) for m in _terms(d) for a, _ in m}, key=str)

    places = {atom: -place for place, atom in enumerate(atoms)}

    def rank(monomial: Monomial) -> tuple[int, list[tuple[int, int]]]:
        """By degree, then by the power of the first atom, then of the second, and so on."""
        powers = [(places[atom], power) for atom, power in monomial]
        return sum(power for _, power in powers), sorted(powers, reverse=True)

    lead = max(divisor.terms, key=rank)
    quotient: list[Dim] = []
    rest = dividend
    while rest != 0:
        terms = _terms(rest)
        first = max(terms, key=rank)
        step = _over(first, lead)
        if step is None or terms[first] % divisor.terms[lead]:
            return None
        part = _made({step: terms[first] // divisor.terms[lead]})
        quotient.append(part)
        rest = rest - part * divisor
    return total(quotient)


def _without_common_factor(dividend: Dim, divisor: Expression) -> tuple[Dim, Dim]:
    """Cancel the product that divides every term of both."""
    terms = [*_terms(dividend), *divisor.terms]
    common = dict(terms[0])
    for monomial in terms[1:]:
        powers = dict(monomial)
        common = {a: min(p, powers[a]) for a, p in common.items() if a in powers}
    number = math.gcd(*_terms(dividend).values(), *divisor.terms.values())
    if not common and number == 1:
        return dividend, divisor
    shared = frozenset(common.items())

    def reduced(dim: Dim) -> Dim:
        terms: dict[Monomial, int] = {}
        for monomial, coefficient in _terms(dim).items():
            left = _over(monomial, shared)
            assert left is not None, "the common factor divides every term"
            terms[left] = coefficient // number
        return _made(terms)

    return reduced(dividend), reduced(divisor)


def _extreme(dims: Iterable[Dim], *, least: bool) -> Dim:
    kind, opposite = (Least, Greatest) if least else (Greatest, Least)
    pick: Callable[[int, int], int] = min if least else max
    flat: list[Dim] = []
    for dim in dims:
        inner = _lone_atom(dim)
        flat.extend(inner.of if isinstance(inner, kind) else (dim,))
    # min(a, max(a, b)) is a.
    given = set(flat)
    absorbed = (_lone_atom(dim) for dim in flat)
    flat = [
        dim
        for dim, inner in zip(flat, absorbed, strict=True)
        if not (isinstance(inner, opposite) and inner.of & given)
    ]
    # Of extents that differ by a constant only one counts: group by what is not constant.
    best: dict[Dim, int] = {}
    for dim in flat:
        constant = _terms(dim).get(_ONE, 0)
        stem = dim - constant
        best[stem] = pick(best[stem], constant) if stem in best else constant
    kept = [stem + constant for stem, constant in best.items()]
    return kept[0] if len(kept) == 1 else _atom_of(kind(frozenset(kept)))


def _lone_atom(dim: Dim) -> Atom | None:
    if isinstance(dim, Expression) and len(dim.terms) == 1:
        ((monomial, coefficient),) = dim.terms.items()
        if coefficient == 1 and len(monomial) == 1:
            ((atom, power),) = monomial
            return atom if power == 1 else None
    return None


def _atom_symbols(atom: Atom) -> frozenset[str]:
    match atom:
        case Symbol():
            return frozenset({atom.name})
        case Quotient():
            return symbols(atom.numerator) | symbols(atom.divisor)
        case Least() | Greatest():
            return frozenset().union(*map(symbols, atom.of))


def _substitute_atom(atom: Atom, by: Mapping[str, Dim]) -> Dim:
    match atom:
        case Symbol():
            return by[atom.name] if atom.name in by else _atom_of(atom)
        case Quotient():
            return substitute(atom.numerator, by) // substitute(atom.divisor, by)
        case Least():
            return minimum(*(substitute(dim, by) for dim in atom.of))
        case Greatest():
            return maximum(*(substitute(dim, by) for dim in atom.of))


# Bounds


def _naive(dim: Dim, ranges: Mapping[str, Interval]) -> Interval:
    """Return bounds term by term, as if the terms had nothing to do with each other."""
    if not isinstance(dim, Expression):
        return dim, dim
    low: float = 0
    high: float = 0
    for monomial, coefficient in dim.terms.items():
        term: Interval = (coefficient, coefficient)
        for atom, power in monomial:
            bounds = _atom_interval(atom, ranges)
            for _ in range(power):
                term = _product(term, bounds)
        low, high = low + term[0], high + term[1]
    return (-math.inf if math.isnan(low) else low), (math.inf if math.isnan(high) else high)


def _atom_interval(atom: Atom, ranges: Mapping[str, Interval]) -> Interval:
    match atom:
        case Symbol():
            return ranges.get(atom.name, (0, math.inf))
        case Quotient():
            return _quotient(interval(atom.numerator, ranges), interval(atom.divisor, ranges))
        case Least():
            bounds = [interval(dim, ranges) for dim in atom.of]
            return min(low for low, _ in bounds), min(high for _, high in bounds)
        case Greatest():
            bounds = [interval(dim, ranges) for dim in atom.of]
            return max(low for low, _ in bounds), max(high for _, high in bounds)


def _product(a: Interval, b: Interval) -> Interval:
    corners = [0 if x == 0 or y == 0 else x * y for x in a for y in b]
    return min(corners), max(corners)


def _quotient(above: Interval, below: Interval) -> Interval:
    if below[1] < 0:
        return _quotient((-above[1], -above[0]), (-below[1], -below[0]))
    if below[0] < 0:
        return -math.inf, math.inf
    # Division by zero has no value to bound, so a divisor counts from 1.
    divisors = (max(1, below[0]), max(1, below[1]))
    corners = [_floor(x, y) for x in above for y in divisors]
    return min(corners), max(corners)


def _floor(above: float, below: float) -> float:
    if math.isinf(above):
        return above
    if math.isinf(below):
        return -1 if above < 0 else 0
    return above // below


def _monotone(dim: Expression, ranges: Mapping[str, Interval]) -> Interval:
    """Return bounds with each symbol that ``dim`` rises or falls with at its ends."""
    lows = dict(ranges)
    highs = dict(ranges)
    for name in dim.symbols:
        low, high = ranges.get(name, (0, math.inf))
        direction = _direction(dim, name, ranges)
        if direction is not None and direction >= 0:
            lows[name], highs[name] = (low, low), (high, high)
        elif direction is not None:
            lows[name], highs[name] = (high, high), (low, low)
    return _naive(dim, lows)[0], _naive(dim, highs)[1]


def _direction(dim: Dim, name: str, ranges: Mapping[str, Interval]) -> int | None:
    """Return 1 where ``dim`` never falls as the symbol rises, -1 for the opposite, 0 for neither.

    None where it is not known.
    """
    if not isinstance(dim, Expression) or name not in dim.symbols:
        return 0
    found = set()
    for atom in dim.atoms_with[name]:
        inner = _atom_direction(atom, name, ranges)
        low, high = _naive(_derivative(dim, atom), ranges)
        outer = 1 if low >= 0 else -1 if high <= 0 else None
        if inner is None or outer is None:
            return None
        found.add(inner * outer)
    return _agreed(found)


def _atom_direction(atom: Atom, name: str, ranges: Mapping[str, Interval]) -> int | None:
    match atom:
        case Symbol():
            return 1
        case Quotient():
            if name in symbols(atom.divisor) or interval(atom.divisor, ranges)[0] < 0:
                return None
            return _direction(atom.numerator, name, ranges)
        case Least() | Greatest():
            directions = {_direction(dim, name, ranges) for dim in atom.of}
            return None if None in directions else _agreed({d for d in directions if d is not None})


def _agreed(directions: set[int]) -> int | None:
    moving = directions - {0}
    return None if len(moving) > 1 else next(iter(moving), 0)


def _derivative(dim: Expression, atom: Atom) -> Dim:
    terms: dict[Monomial, int] = {}
    for monomial in dim.monomials_with[atom]:
        powers = dict(monomial)
        power = powers[atom]
        powers[atom] = power - 1
        key = frozenset((a, p) for a, p in powers.items() if p)
        terms[key] = terms.get(key, 0) + dim.terms[monomial] * power
    return _made(terms)


def _without_rounding(dim: Expression, ranges: Mapping[str, Interval]) -> Interval:
    """Return bounds from ``n - (b-1) <= b*floor(n/b) <= n``, where the sum may cancel.

    The padding ``floor((x + 6)/7)*7 - x`` is 0 to 6 however large ``x`` is.
    """
    scale = 1
    for monomial in dim.terms:
        if (rounded := _rounded(monomial)) is not None:
            scale = math.lcm(scale, rounded[1])
    if scale == 1:
        return -math.inf, math.inf
    lows: list[Dim] = []
    highs: list[Dim] = []
    for monomial, coefficient in dim.terms.items():
        rounded = _rounded(monomial)
        rest = None if rounded is None else _made({monomial - {(rounded[0], 1)}: 1})
        if rounded is None or rest is None or _naive(rest, ranges)[0] < 0:
            lows.append(_made({monomial: coefficient * scale}))
            highs.append(lows[-1])
            continue
        quotient, divisor = rounded
        factor = rest * (coefficient * scale // divisor)
        ends = (factor * (quotient.numerator - (divisor - 1)), factor * quotient.numerator)
        lows.append(ends[0] if coefficient > 0 else ends[1])
        highs.append(ends[1] if coefficient > 0 else ends[0])
    low, high = _naive(total(lows), ranges)[0], _naive(total(highs), ranges)[1]
    return -_floor(-low, scale), _floor(high, scale)


def _rounded(monomial: Monomial) -> tuple[Quotient, int] | None:
    """Return the one division by a number in ``monomial``."""
    found = [
        (atom, atom.divisor)
        for atom, power in monomial
        if isinstance(atom, Quotient) and isinstance(atom.divisor, int) and power == 1
    ]
    return found[0] if len(found) == 1 else None
