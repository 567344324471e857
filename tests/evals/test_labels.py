from longwave.evals.labels import by_budget, measured_by


def test_commands_that_name_other_tasks_are_not_shown():
    commands = [
        "run --task a --method x",
        "run --task=b",
        "run --recipe r.yaml",
        "run --task 'a",
        "run --task a --method x",
    ]
    header = {"tasks": {"a": {}, "b": {}}, "runs": [{"command": command} for command in commands]}
    assert measured_by(header, ["a"]) == [commands[0], commands[2], commands[3]]
    assert measured_by(header, ["b"]) == [commands[1], commands[2], commands[3]]
    assert measured_by({**header, "runs": [{"command": ""}]}, ["a"]) == ["(run from Python: no command was recorded)"]


def test_budgets_in_order():
    methods = ["dense", "a:budget=0.125", "b:budget=2GiB", "c:budget=0.5", "d:store=kivi,budget=0.125", "[e", "f"]
    assert by_budget(methods) == [
        ("budget 0.5", ["dense", "c:budget=0.5"]),
        ("budget 0.125", ["dense", "a:budget=0.125", "d:store=kivi,budget=0.125"]),
        ("budget 2GiB", ["dense", "b:budget=2GiB"]),
        ("no budget", ["dense", "[e", "f"]),
    ]
