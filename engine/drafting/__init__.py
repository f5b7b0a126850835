"""A small model beside the large one that drafts coming tokens, which the large one checks in its next sweep.

It imports no file that lies beside the rooms: what computes a sweep is given to it.
"""
