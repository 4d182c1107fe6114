import json


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()], False
def read_record(path):
    return json.loads(path.read_text())
