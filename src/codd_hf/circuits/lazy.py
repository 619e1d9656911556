"""Values that are computed once, in a form that `torch.compile` can follow."""

from __future__ import annotations

import functools


class cached_property(functools.cached_property):
    """`functools.cached_property` without the lock of Python 3.11, which would break a graph."""

    def __get__(self, instance, owner=None):
        if instance is None:
            return self
        values = instance.__dict__
        if self.attrname not in values:
            values[self.attrname] = self.func(instance)
        return values[self.attrname]
