"""Where tests reach inside of the library: in these modules alone, by subject, and each for a reason that stands beside it.

A test reaches inside for one of four reasons: it runs a part by itself, it breaks a part to see what becomes of the whole, it
looks whether nothing is left behind, or it puts a clock in the place of time. What can be seen from outside is no reason.

Names in capitals are places for `monkeypatch.setattr`.
"""
