"""The sections of a report, a file each: tables and charts from the findings of a folder."""
