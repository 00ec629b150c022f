"""The merge: check, plan, merge, finish, report."""
