"""Invented records in each data set's columns, with answers, as difficult as the data set's own."""

from __future__ import annotations

from flexgen_helm.data_wrangling.datasets import NO, YES

Record = tuple[str, ...]
"""Values of a data set's columns, in their order."""

_PAPERS: tuple[tuple[Record, Record, str], ...] = (
    (
        ("lazy maintenance of join views", "p okafor , l brandt", "vldb", "1999"),
        ("lazy maintenance of join views", "peter okafor , lena brandt", "very large data bases", "1999"),
        YES,
    ),
    (
        ("lazy maintenance of join views", "p okafor , l brandt", "vldb", "1999"),
        ("lazy evaluation of recursive views", "m tanaka", "sigmod conference", "1996"),
        NO,
    ),
    (
        ("a cost model for nested queries", "r silva", "sigmod conference", "1994"),
        ("a cost model for nested queries ( extended abstract )", "rui silva", "acm sigmod", "1994"),
        YES,
    ),
    (
        ("report on the third workshop on sensor data", "j moreau", "sigmod record", "2002"),
        ("report on the fourth workshop on sensor data", "j moreau", "sigmod record", "2003"),
        NO,
    ),
    (
        ("editor 's notes", "k lindqvist", "sigmod record", "2000"),
        ("editor 's notes", "a petrov", "sigmod record", "2001"),
        NO,
    ),
    (
        ("indexing moving points on a disk", "s rao , d kim , e weiss", "acm trans . database syst .", "2001"),
        ("indexing moving points on disk", "s rao , d kim", "acm transactions on database systems", ""),
        YES,
    ),
)

PAIRS: dict[str, tuple[tuple[Record, Record, str], ...]] = {
    "Fodors-Zagats": (
        (
            ("the copper kettle", "18 w. mill st.", "new york", "212/555-0118", "american"),
            (
                "copper kettle",
                "18 w. mill st. between 2nd and 3rd aves.",
                "new york city",
                "212-555-0118",
                "american (new)",
            ),
            YES,
        ),
        (
            ("the copper kettle", "18 w. mill st.", "new york", "212/555-0118", "american"),
            ("the copper pot", "240 harbor blvd.", "los angeles", "213-555-0171", "american"),
            NO,
        ),
        (
            ("trattoria lucia", "905 grant ave.", "san francisco", "415/555-0190", "italian"),
            ("lucia 's", "905 grant ave.", "san francisco", "415-555-0190", "pizza"),
            YES,
        ),
        (
            ("noodle house ( the grand hotel )", "3000 palm blvd. s", "las vegas", "702/555-0133", "asian"),
            ("steak house ( the grand hotel )", "3000 palm blvd. s", "las vegas", "702-555-0136", "steakhouses"),
            NO,
        ),
        (
            ("cafe orleans", "77 peach rd.", "atlanta", "404/555-0102", "cajun"),
            ("cafe marseille", "1177 peach rd.", "atlanta", "404-555-0149", "french"),
            NO,
        ),
        (
            ("el sol", "4410 sunset ave.", "los angeles", "310/555-0155", "mexican"),
            ("el sol cantina", "4410 sunset ave.", "w. hollywood", "310-555-0155", "tex-mex"),
            YES,
        ),
    ),
    "Beer": (
        (
            ("Old Mill Amber", "Riverside Brewing Company"),
            ("Riverside Old Mill Amber Ale", "Riverside Brewing Co."),
            YES,
        ),
        (("Old Mill Amber", "Riverside Brewing Company"), ("Old Mill Porter", "Riverside Brewing Company"), NO),
        (("Harvest Moon Red", "Three Oaks Brewery"), ("Harvest Moon Red", "Lakeview Brewpub"), NO),
        (("Fuchs Rotbier", "Brauerei Fuchs"), ("Fuchs Rotbier", "Privatbrauerei Fuchs GmbH"), YES),
        (("Cinder Cone Red Ale", "Summit Peak"), ("Cinder Cone Red Ale - Rum Barrel Aged", "Summit Peak"), NO),
        (("Jack 's Irish Red", "Dockside"), ("Jack Irish Red Ale", "Dockside Brewery & Grill"), YES),
    ),
    "iTunes-Amazon": (
        (
            ("Slow River", "Mara Quinn", "Tides", "Country , Music", "$ 1.29", "3:41", "4-May-12"),
            ("Slow River", "Mara Quinn", "Tides ( Deluxe )", "Country", "$ 1.29", "3:41", "May 4 , 2012"),
            YES,
        ),
        (
            ("Slow River", "Mara Quinn", "Tides", "Country , Music", "$ 1.29", "3:41", "4-May-12"),
            ("Slow River ( Live )", "Mara Quinn", "Live in Reno", "Country", "$ 0.99", "5:02", "June 1 , 2014"),
            NO,
        ),
        (
            ("Night Bus ( feat . Dex )", "Kilo", "Routes", "Hip-Hop/Rap , Music", "$ 1.29", "4:10", "8-Oct-13"),
            ("Night Bus [ feat . Dex ] [ Explicit ]", "Kilo", "Routes [ Explicit ]", "Rap", "$ 1.29", "4:10", ""),
            YES,
        ),
        (
            ("Paper Planets", "Juno Vale", "Orbit", "Pop , Music", "$ 1.29", "3:15", "2-Feb-15"),
            ("Paper Planets ( Club Remix )", "Juno Vale", "Orbit Remixed", "Dance", "$ 1.29", "6:20", "May 9 , 2015"),
            NO,
        ),
        (
            ("Intro", "The Lanterns", "First Light", "Rock , Music", "$ 0.99", "1:05", "6-Jan-09"),
            ("Intro", "The Harbors", "Salt", "Rock", "$ 0.99", "1:07", "March 3 , 2011"),
            NO,
        ),
        (
            ("Ember", "Sol & Sister", "Hearth", "Folk , Music", "$ 0.99", "2:58", "9-Sep-14"),
            ("Ember [ Clean ]", "Sol and Sister", "Hearth", "Folk", "$ 1.29", "2:58", "September 9 , 2014"),
            YES,
        ),
    ),
    "Walmart-Amazon": (
        (
            ("norda 500gb portable hard drive black", "nd500b"),
            ("norda 500 gb usb 2.0 portable external hard drive nd500b ( black )", "nd500b"),
            YES,
        ),
        (
            ("norda 500gb portable hard drive black", "nd500b"),
            ("norda 750 gb usb 3.0 portable external hard drive ( black )", "nd750b"),
            NO,
        ),
        (
            ("plexo high yield magenta toner cartridge", "px2040m"),
            ("plexo high yield cyan toner cartridge for plexo 2040", "px2040c"),
            NO,
        ),
        (
            ("tarn 15.6 laptop sleeve", "tr-156"),
            ("tarn tr156 sleeve for laptops up to 15.6 inches gray", "tr156"),
            YES,
        ),
        (
            ("volta rechargeable aa batteries 4-pack", "vt-aa4"),
            ("volta rechargeable aa batteries 8 pack", "vt-aa8"),
            NO,
        ),
        (
            ("ridgeline binoculars 10x42", ""),
            ("ridgeline 10x42 roof prism waterproof binoculars", "rl1042"),
            YES,
        ),
    ),
    "Amazon-Google": (
        (
            ("photo workshop deluxe 4.0", "brightsoft", "39.99"),
            ("brightsoft photo workshop 4 deluxe ( win 98/me/xp )", "", "35.5"),
            YES,
        ),
        (
            ("photo workshop deluxe 4.0", "brightsoft", "39.99"),
            ("brightsoft photo workshop 4 standard upgrade", "", "17.95"),
            NO,
        ),
        (
            ("learn italian now ! version 9", "linguatech", "29.99"),
            ("learn spanish now ! version 9", "linguatech", "29.99"),
            NO,
        ),
        (
            ("ledger pro 2007 small business", "accora", "199.95"),
            ("accora ledger pro small business 2007 full version pc", "accora", "189.0"),
            YES,
        ),
        (
            ("ledger pro 2007 ( mac )", "accora", "199.95"),
            ("accora ledger pro 2006 for windows", "accora", "149.99"),
            NO,
        ),
        (
            ("typing coach 12", "keystone education", "19.99"),
            ("keystone typing coach v12 jewel case", "", "14.99"),
            YES,
        ),
    ),
    "DBLP-ACM": _PAPERS,
    "DBLP-GoogleScholar": _PAPERS,
}

RECORDS: dict[str, tuple[tuple[Record, str], ...]] = {
    "Restaurant": (
        (("the copper kettle", "18 w. mill st.", "212/555-0118", "american"), "new york"),
        (("el sol", "4410 sunset ave.", "213/555-0155", "mexican"), "los angeles"),
        (("trattoria lucia", "905 grant ave.", "415/555-0190", "italian"), "san francisco"),
        (("cafe orleans", "77 peach rd.", "404/555-0102", "cajun"), "atlanta"),
        (("noodle house", "3000 palm blvd. s", "702/555-0133", "asian"), "las vegas"),
        (("copper kettle uptown", "1200 3rd ave.", "212-555-0119", "american (new)"), "new york city"),
    ),
    "Buy": (
        (("Norda 500GB Portable Hard Drive - ND500B", "USB 2.0 - 5400 rpm - Black"), "Norda"),
        (("Plexo 2040 Magenta Toner Cartridge - PX2040M", "Laser - Magenta - 4000 Pages"), "Plexo"),
        (("Harlan & Lowe Bookshelf Speaker Pair - HL22", "2-way - 100W"), "Harlan & Lowe"),
        (("TarnGear 15.6' Laptop Sleeve", "Neoprene - Gray"), "Tarn Gear Inc."),
        (("Ridgeline Binoculars", "Ridgeline 10x42 Roof Prism - Waterproof"), "Ridgeline Optics"),
        (("Volta AA Charger - VTC4", "Charges four AA or AAA cells in two hours"), "Volta"),
    ),
}

CELLS = (
    ("City", "mobile", NO),
    ("City", "mobixe", YES),
    ("HospitalName", "saint anne regional medical center", NO),
    ("MeasureName", "pneumonia paxients assessed and given influenza vaccination", YES),
    ("Score", "9x%", YES),
    ("Sample", "121 patients", NO),
)

ADULT_COLUMNS = (
    *("age", "workclass", "education", "maritalstatus", "occupation", "relationship"),
    *("race", "sex", "hoursperweek", "country", "income"),
)
ADULT: tuple[tuple[Record, str, str], ...] = (
    (
        (
            *("31-50", "Private", "HS-grad", "Married-civ-spouse", "Craft-repair", "Husband"),
            *("White", "Male", "40", "United-States", "LessThan50K"),
        ),
        "education",
        NO,
    ),
    (
        (
            *("22-30", "Private", "Bachelors", "Never-married", "Sales", "Not-in-family"),
            *("Black", "Female", "40", "United-States", "LesssThan50K"),
        ),
        "income",
        YES,
    ),
    (
        (
            *("<18", "Private", "Masters", "Never-married", "Other-service", "Own-child"),
            *("White", "Female", "15", "United-States", "LessThan50K"),
        ),
        "education",
        YES,
    ),
    (
        (
            *(">50", "", "10th", "Widowed", "", "Unmarried"),
            *("White", "Female", "20", "Mexico", "LessThan50K"),
        ),
        "occupation",
        NO,
    ),
    (
        (
            *("31-50", "State-gov", "Doctorate", "Married-civ-spouse", "Prof-specialty", "Husband"),
            *("Asian-Pac-Islander", "Female", "50", "India", "MoreThan50K"),
        ),
        "sex",
        YES,
    ),
    (
        (
            *("18-21", "Private", "Some-college", "Never-married", "Adm-clerical", "Own-child"),
            *("White", "Male", "25", "United-States", "LessThan50K"),
        ),
        "hoursperweek",
        NO,
    ),
)

COLUMNS = (
    ("drug_era-drug_era_start_date", "patients-lastname", NO),
    ("observation-value_as_string", "observations-value", YES),
    ("death-death_date", "patients-deathdate", YES),
    ("location-zip", "providers-speciality", NO),
    ("procedure_occurrence-procedure_date", "procedures-date", YES),
    ("cost-total_paid", "immunizations-patient", NO),
)
