"""x"""
def describe(rows, rejected=()):
    return {"duplicates": {"replies": 0}}
