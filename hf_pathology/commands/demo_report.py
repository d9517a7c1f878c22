def write_demo_report(*a):
    pass
