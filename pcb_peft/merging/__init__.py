"""The merge: check, plan, compete, finish, report."""
