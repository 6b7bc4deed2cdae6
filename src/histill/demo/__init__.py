"""`histill demo`: slides to student to report, offline."""
